"""The VQ-VAE notebook of zalandoresearch/pytorch-vq-vae and its copies: VectorQuantizer and VectorQuantizerEMA."""

from typing import Any

import torch
from torch import Tensor, nn

from vqkernels.fuse import _by_shape, _steps
from vqkernels.fuse._by_shape import Attributes
from vqkernels.fuse._recipes import Recipe
from vqkernels.ops import vector_quantize


def _vector_quantizer(self: Any, inputs: Tensor) -> tuple[Tensor, ...]:
    quantized, loss, indices = _steps.quantize_image(inputs, self._embedding.weight, self._commitment_cost, 1.0)
    encodings = _steps.one_hot(indices, self._num_embeddings, torch.get_default_dtype())
    return loss, quantized, _steps.perplexity(encodings), encodings


def _vector_quantizer_ema(self: Any, inputs: Tensor) -> tuple[Tensor, ...]:
    weight = self._embedding.weight
    if not _steps.is_single(weight, self._ema_w, self._ema_cluster_size):
        return type(self).forward(self, inputs)
    rows = inputs.permute(0, 2, 3, 1)
    quantized, indices, loss, counts, sums = vector_quantize(
        rows.reshape(-1, weight.shape[1]).float(),
        weight.detach(),
        commitment_weight=self._commitment_cost,
        statistics=self.training,
    )
    if counts is not None and sums is not None:
        _move_codes(self, counts, sums)
    encodings = _steps.one_hot(indices.clamp(min=0), self._num_embeddings, torch.get_default_dtype())
    quantized = quantized.view(rows.shape).permute(0, 3, 1, 2).contiguous()
    return loss, quantized, _steps.perplexity(encodings), encodings


@torch.no_grad()
def _move_codes(module: Any, counts: Tensor, sums: Tensor) -> None:
    """The moving averages as they are kept there: smoothed counts are stored, and parameters made anew."""
    decay, eps = module._decay, module._epsilon
    size = module._ema_cluster_size * decay + (1 - decay) * counts
    total = size.sum()
    module._ema_cluster_size = (size + eps) / (total + module._num_embeddings * eps) * total
    module._ema_w = nn.Parameter(module._ema_w * decay + (1 - decay) * sums)
    module._embedding.weight = nn.Parameter(module._ema_w / module._ema_cluster_size.unsqueeze(1))


def _refuse(module: Any) -> str | None:
    return None if _steps.is_number(module._commitment_cost) else f"_commitment_cost is {module._commitment_cost}"


_TABLE: Attributes = {
    "_embedding": nn.Embedding,
    "_num_embeddings": int,
    "_embedding_dim": int,
    "_commitment_cost": (int, float),
}

RECIPES: tuple[Recipe, ...] = (
    _by_shape.recipe(
        "zalandoresearch",
        "VectorQuantizer",
        {"forward": _vector_quantizer},
        attributes=_TABLE,
        table=lambda module: module._embedding.weight,
        codes=lambda module: module._embedding.weight,
        inputs=_steps.image,
        refuse=_refuse,
    ),
    _by_shape.recipe(
        "zalandoresearch",
        "VectorQuantizerEMA",
        {"forward": _vector_quantizer_ema},
        attributes={**_TABLE, "_ema_w": nn.Parameter, "_ema_cluster_size": Tensor, "_decay": float, "_epsilon": float},
        table=lambda module: module._embedding.weight,
        codes=lambda module: module._embedding.weight,
        inputs=_steps.image,
        refuse=_refuse,
    ),
)
