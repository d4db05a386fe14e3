"""encodec: its codebooks, and in evaluation a residual quantizer in one call."""

from typing import Any

import torch
from torch import Tensor

from vqkernels.fuse import _steps
from vqkernels.fuse._levels import can_fuse_levels, encode_levels, refuse_levels
from vqkernels.fuse._recipes import Recipe
from vqkernels.fuse._search import nearest, nearest_levels
from vqkernels.ops import code_statistics, ema_update_, nearest_code


def _quantize(self: Any, x: Tensor) -> Tensor:
    return nearest(x, self.embed)


def _codebook_forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    state = (self.embed, self.embed_avg, self.cluster_size)
    if not self.training or x.dtype == torch.float64 or not _steps.is_single(*state):
        return type(self).forward(self, x)
    rows = self.preprocess(x)
    self.init_embed_(rows)
    found = nearest_code(rows, self.embed)
    indices = self.postprocess_emb(found.clamp(min=0), x.shape)
    quantized = self.dequantize(indices)
    counts, sums = code_statistics(rows, found, self.codebook_size)
    self.expire_codes_(rows)
    ema_update_(self.embed, self.cluster_size, self.embed_avg, counts, sums, decay=self.decay, eps=self.epsilon)
    return quantized, indices


def _residual_forward(self: Any, x: Tensor, n_q: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    layers = self.layers[: n_q or len(self.layers)]
    codebooks = [layer._codebook.embed for layer in layers]
    # The first rows make the codes, in evaluation too.
    initialized = all(layer._codebook.inited for layer in layers)
    if self.training or not initialized or not can_fuse_levels(layers, x, codebooks):
        return type(self).forward(self, x, n_q)
    quantized, indices = nearest_levels(x.mT, codebooks)
    return quantized.mT, indices.movedim(-1, 0).contiguous(), torch.zeros(len(layers), 1, device=x.device)


def _residual_encode(self: Any, x: Tensor, n_q: int | None = None) -> Tensor:
    return encode_levels(self, x, n_q, lambda layer: layer._codebook.embed)


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        library="encodec",
        class_path="encodec.quantization.core_vq.EuclideanCodebook",
        methods={"quantize": _quantize, "forward": _codebook_forward},
        sources=frozenset({"4f00a84a76fe18a1"}),
        versions="0.1.1",
        uses=("ema_inplace", "laplace_smoothing"),
    ),
    Recipe(
        library="encodec",
        class_path="encodec.quantization.core_vq.ResidualVectorQuantization",
        methods={"forward": _residual_forward, "encode": _residual_encode},
        sources=frozenset({"e2be0df368d51e73"}),
        versions="0.1.1",
        uses=("VectorQuantization", "EuclideanCodebook"),
        refuse=refuse_levels,
    ),
)
