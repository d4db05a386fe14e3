"""taming-transformers, and the many that took its quantizers over: VectorQuantizer and VectorQuantizer2."""

from typing import Any

from torch import Tensor, nn

from vqkernels.fuse import _by_shape, _steps
from vqkernels.fuse._by_shape import Attributes
from vqkernels.fuse._recipes import Recipe


def _vector_quantizer(self: Any, z: Tensor) -> tuple[Any, ...]:
    # The weight stands on the term that moves the codes, as it does there.
    quantized, loss, indices = _steps.quantize_image(z, self.embedding.weight, 1.0, self.beta)
    encodings = _steps.one_hot(indices, self.n_e, z.dtype)
    return quantized, loss, (_steps.perplexity(encodings), encodings, indices.unsqueeze(1))


def _vector_quantizer_2(
    self: Any, z: Tensor, temp: Any = None, rescale_logits: Any = False, return_logits: Any = False
) -> tuple[Any, ...]:
    if temp not in (None, 1.0) or rescale_logits or return_logits:
        return type(self).forward(self, z, temp, rescale_logits, return_logits)
    quantized, loss, indices = _steps.quantize_image(z, self.embedding.weight, *loss_weights(self))
    return quantized, loss, (None, None, arrange_indices(self, indices, quantized))


def loss_weights(module: Any) -> tuple[float, float]:
    """The weights of the terms that move rows and codes: beta stands on the second under `legacy`."""
    return (1.0, module.beta) if module.legacy else (module.beta, 1.0)


def arrange_indices(module: Any, indices: Tensor, quantized: Tensor) -> Tensor:
    """Indices [N] in the numbers (`remap`) and the shape (`sane_index_shape`) that the module returns."""
    batch, _, height, width = quantized.shape
    if module.remap is not None:
        indices = module.remap_to_used(indices.reshape(batch, -1)).reshape(-1, 1)
    return indices.reshape(batch, height, width) if module.sane_index_shape else indices


def _refuse(module: Any) -> str | None:
    if not _steps.is_number(module.beta):
        return f"beta is {module.beta}"
    return None


_TABLE: Attributes = {"embedding": nn.Embedding, "n_e": int, "e_dim": int, "beta": (int, float)}

RECIPES: tuple[Recipe, ...] = (
    _by_shape.recipe(
        "taming",
        "VectorQuantizer",
        {"forward": _vector_quantizer},
        attributes=_TABLE,
        table=lambda module: module.embedding.weight,
        codes=lambda module: module.embedding.weight,
        inputs=_steps.image,
        refuse=_refuse,
    ),
    _by_shape.recipe(
        "taming",
        "VectorQuantizer2",
        {"forward": _vector_quantizer_2},
        attributes={**_TABLE, "legacy": bool, "remap": object, "sane_index_shape": bool},
        table=lambda module: module.embedding.weight,
        codes=lambda module: module.embedding.weight,
        inputs=_steps.image,
        refuse=_refuse,
        others={"quant_resi": "VAR resizes and convolves between the searches of its scales"},
    ),
)
