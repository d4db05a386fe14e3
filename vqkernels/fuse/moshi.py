"""moshi: its codebooks, kept as sums and usage, and in evaluation a residual quantizer in one call."""

import math
from typing import Any

import torch
from torch import Tensor

from vqkernels.fuse import _steps
from vqkernels.fuse._levels import can_fuse_levels, encode_levels, refuse_levels
from vqkernels.fuse._recipes import Recipe, neighbour
from vqkernels.fuse._search import nearest, nearest_levels
from vqkernels.ops import code_statistics, nearest_code


def _quantize(self: Any, x: Tensor) -> Tensor:
    return nearest(x, self.embedding)


def _codebook_forward(self: Any, x: Tensor, initialize: bool = True) -> Any:
    if not self.training or not _steps.is_single(x, self.cluster_usage, self.embedding_sum):
        return type(self).forward(self, x, initialize)
    rows = self._reshape_input(x)
    if initialize:
        self._init_embedding(rows.detach())
    found = nearest_code(rows, self.embedding)
    codes = self._reshape_codes(found.clamp(min=0), x.shape)
    quantized = self.decode(codes)
    metrics = {"rvq_expired": self._check_expired_codes(rows)}
    counts, sums = code_statistics(rows, found, self.codebook_size)
    self.cluster_usage.mul_(self.decay).add_(counts.float(), alpha=1 - self.decay)
    if self.initialized:
        share = self.cluster_usage / self.cluster_usage.sum()
        metrics["rvq_entropy"] = torch.special.entr(share).sum() / math.log(self.codebook_size)
    self.embedding_sum.mul_(self.decay).add_(sums, alpha=1 - self.decay)
    self.register_buffer("_embedding", None)
    return neighbour(self, "_CodebookForwardResult")(quantized, codes, metrics)


def _residual_forward(self: Any, x: Tensor, n_q: int | None = None) -> Any:
    layers = self.layers[: n_q or len(self.layers)]
    codebooks = [layer.embedding for layer in layers]
    if self.training or not can_fuse_levels(layers, x, codebooks):
        return type(self).forward(self, x, n_q)
    quantized, indices = nearest_levels(x.mT, codebooks)
    losses = torch.zeros(len(layers), device=x.device)
    return neighbour(self, "_VQForwardResult")(quantized.mT, indices.movedim(-1, 0).contiguous(), losses, {})


def _residual_encode(self: Any, x: Tensor, n_q: int | None = None) -> Tensor:
    return encode_levels(self, x, n_q, lambda layer: layer.embedding)


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        library="moshi",
        class_path="moshi.quantization.core_vq.EuclideanCodebook",
        methods={"_quantize": _quantize, "forward": _codebook_forward},
        sources=frozenset({"3843a931b8d3b80d"}),
        versions="0.2.13",
        uses=("_ema_inplace", "_compute_entropy", "_CodebookForwardResult"),
    ),
    Recipe(
        library="moshi",
        class_path="moshi.quantization.core_vq.ResidualVectorQuantization",
        methods={"forward": _residual_forward, "encode": _residual_encode},
        sources=frozenset({"6da4b1151a248790"}),
        versions="0.2.13",
        uses=("VectorQuantization", "EuclideanCodebook", "_VQForwardResult"),
        refuse=refuse_levels,
    ),
)
