"""rosinality/vq-vae-2-pytorch and its copies: Quantize, whose codes are the columns of `embed`."""

from typing import Any

import torch
from torch import Tensor

from vqkernels.fuse import _by_shape, _steps
from vqkernels.fuse._recipes import Recipe
from vqkernels.ops import vector_quantize


def _quantize(self: Any, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Some copies add up the statistics of all processes, others do not; what is not float32 is left to the original.
    by_original = self.training and _steps.several_processes()
    if by_original or not _steps.is_single(self.embed, self.cluster_size, self.embed_avg):
        return type(self).forward(self, input)
    quantized, indices, loss, counts, sums = vector_quantize(
        input.float().reshape(-1, self.dim),
        self.embed.t().clone(memory_format=torch.contiguous_format),  # the backward pass reads what changes below
        statistics=self.training,
    )
    if counts is not None and sums is not None:
        _move_codes(self, counts, sums)
    return quantized.view(input.shape), loss, indices.clamp(min=0).view(input.shape[:-1])


@torch.no_grad()
def _move_codes(module: Any, counts: Tensor, sums: Tensor) -> None:
    module.cluster_size.mul_(module.decay).add_(counts.float(), alpha=1 - module.decay)
    module.embed_avg.mul_(module.decay).add_(sums.t(), alpha=1 - module.decay)
    total = module.cluster_size.sum()
    smoothed = (module.cluster_size + module.eps) / (total + module.n_embed * module.eps) * total
    torch.div(module.embed_avg, smoothed, out=module.embed)


RECIPES: tuple[Recipe, ...] = (
    _by_shape.recipe(
        "rosinality",
        "Quantize",
        {"forward": _quantize},
        attributes={
            "embed": Tensor,
            "cluster_size": Tensor,
            "embed_avg": Tensor,
            "dim": int,
            "n_embed": int,
            "decay": float,
            "eps": float,
        },
        table=lambda module: module.embed,
        codes=lambda module: module.embed.t(),
        inputs=lambda rows: rows.view(2, 4, 4, -1),
    ),
)
