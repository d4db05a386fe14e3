"""SimVQ (youngsheen/SimVQ): a frozen codebook behind a linear layer."""

from typing import Any

import torch
from torch import Tensor, nn

from vqkernels.fuse import _by_shape, _steps
from vqkernels.fuse._recipes import Recipe
from vqkernels.fuse.taming import arrange_indices, loss_weights


def _sim_vq(
    self: Any, z: Tensor, temp: Any = None, rescale_logits: Any = False, return_logits: Any = False
) -> tuple[Any, ...]:
    if temp not in (None, 1.0) or rescale_logits or return_logits:
        return type(self).forward(self, z, temp, rescale_logits, return_logits)
    quantized, loss, indices = _steps.quantize_image(z, _codes(self), *loss_weights(self))
    zero = torch.tensor(0.0)
    breakdown = _loss_breakdown(self)(zero, zero, loss, zero)
    return (quantized, zero, arrange_indices(self, indices, quantized)), breakdown


def _codes(module: Any) -> Tensor:
    return module.embedding_proj(module.embedding.weight)


def _loss_breakdown(module: Any) -> Any:
    """The named tuple of the module's own file, so that it is an instance of that class."""
    return type(module).forward.__globals__.get("LossBreakdown")


def _refuse(module: Any) -> str | None:
    if not _steps.is_number(module.beta):
        return f"beta is {module.beta}"
    if len(getattr(_loss_breakdown(module), "_fields", ())) != 4:
        return "there is no LossBreakdown of four fields beside its class"
    return None


RECIPES: tuple[Recipe, ...] = (
    _by_shape.recipe(
        "SimVQ",
        "SimVQ",
        {"forward": _sim_vq},
        attributes={
            "embedding": nn.Embedding,
            "embedding_proj": nn.Linear,
            "n_e": int,
            "e_dim": int,
            "beta": (int, float),
            "legacy": bool,
            "remap": object,
            "sane_index_shape": bool,
        },
        table=lambda module: module.embedding.weight,
        codes=_codes,
        inputs=_steps.image,
        refuse=_refuse,
    ),
)
