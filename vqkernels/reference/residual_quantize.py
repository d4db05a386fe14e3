"""Residual quantization, level by level, whose gradients are left to autograd."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from vqkernels.reference._beam_search import beam_search
from vqkernels.reference.code_statistics import code_statistics
from vqkernels.reference.nearest_code import nearest_code
from vqkernels.reference.topk_codes import topk_codes
from vqkernels.reference.vector_quantize import quantize_chosen

PerLevel = Tensor | tuple[Tensor, ...]


def residual_quantize(
    z: Tensor,
    codebooks: Tensor | Sequence[Tensor],
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    num_levels: int | Tensor | None = None,
    gradient: str = "straight_through",
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.0,
    statistics: bool = False,
    beam_size: int | None = None,
    beam_weights: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, PerLevel | None, PerLevel | None]:
    """See `vqkernels.residual_quantize`; returns the same five values as a plain tuple."""
    levels = split_levels(codebooks)
    row_shape = z.shape[:-1]
    if mask is not None:
        mask = mask.expand(row_shape)
    num_levels = levels_of_rows(num_levels, row_shape, z.device)
    if levels[0].ndim == 3:
        heads = [
            residual_quantize(
                z[head],
                [level[head] for level in levels],
                metric=metric,
                mask=None if mask is None else mask[head],
                num_levels=None if num_levels is None else num_levels[head],
                gradient=gradient,
                commitment_weight=commitment_weight,
                codebook_weight=codebook_weight,
                statistics=statistics,
                beam_size=beam_size,
                beam_weights=beam_weights,
            )
            for head in range(z.shape[0])
        ]
        return (
            torch.stack([head[0] for head in heads]),
            torch.stack([head[1] for head in heads]),
            torch.stack([head[2] for head in heads]),
            _stack_heads([head[3] for head in heads]),
            _stack_heads([head[4] for head in heads]),
        )

    wide = torch.float64 if torch.float64 in (z.dtype, levels[0].dtype) else torch.float32
    chosen = None
    if beam_size is not None and beam_size > 1:
        chosen = beam_search(
            z.detach().to(wide).reshape(1, prod(row_shape), z.shape[-1]),
            [level.detach().to(wide).unsqueeze(0) for level in levels],
            None if num_levels is None else num_levels.reshape(1, -1),
            beam_size,
            [1.0] * len(levels) if beam_weights is None else beam_weights,
            lambda rows, codes, k: topk_codes(rows, codes, k, metric=metric),
        ).reshape(*row_shape, len(levels))

    residual = z.to(wide)
    quantized = torch.zeros_like(residual)
    runs = torch.ones(row_shape, dtype=torch.bool, device=z.device) if mask is None else mask
    indices, losses, counts, sums = [], [], [], []
    for q, level in enumerate(levels):
        if num_levels is not None:
            runs = runs & (q < num_levels)
        found = nearest_code(residual, level, metric=metric, mask=runs) if chosen is None else chosen[..., q]
        found = found.masked_fill(~runs, -1)
        codes, loss = quantize_chosen(
            residual,
            level,
            found,
            mask=runs,
            gradient=gradient,
            commitment_weight=commitment_weight,
            codebook_weight=codebook_weight,
        )
        quantized = codes if q == 0 else torch.where(runs.unsqueeze(-1), quantized + codes, quantized)
        indices.append(found)
        losses.append(loss)
        if statistics:
            level_counts, level_sums = code_statistics(residual, found, level.shape[0])
            counts.append(level_counts)
            sums.append(level_sums.float())
        runs = found >= 0
        residual = torch.where(runs.unsqueeze(-1), residual - codes.detach(), residual)
    return (
        quantized.to(z.dtype),
        torch.stack(indices, -1),
        torch.stack(losses),
        stack_levels(counts) if statistics else None,
        stack_levels(sums) if statistics else None,
    )


def split_levels(codebooks: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """[K_q, D] or [H, K_q, D] a level."""
    return list(codebooks.unbind(-3)) if isinstance(codebooks, Tensor) else list(codebooks)


def levels_of_rows(num_levels: int | Tensor | None, row_shape: torch.Size, device: torch.device) -> Tensor | None:
    """num_levels as int64 [...], one a row; None where all levels run."""
    if num_levels is None:
        return None
    if not isinstance(num_levels, Tensor):
        num_levels = torch.full((), num_levels, device=device)  # unlike torch.tensor, no copy to wait for
    missing = len(row_shape) - num_levels.ndim
    return num_levels.long().reshape(*num_levels.shape, *[1] * missing).expand(row_shape)


def stack_levels(values: Sequence[Tensor], dim: int = 0) -> PerLevel:
    """One tensor where all levels have equally many codes."""
    return torch.stack(list(values), dim) if len({value.shape for value in values}) == 1 else tuple(values)


def _stack_heads(values: Sequence[PerLevel | None]) -> PerLevel | None:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if tensors:
        return torch.stack(tensors)
    levels = [value for value in values if isinstance(value, tuple)]
    return tuple(torch.stack(level) for level in zip(*levels, strict=True)) if levels else None
