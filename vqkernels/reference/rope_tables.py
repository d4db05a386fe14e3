"""Cosines and sines of rotary position embeddings."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def rope_tables(
    sizes: Sequence[int],
    dim: int,
    *,
    theta: float = 10000.0,
    axes_dims: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    angles = torch.cat(
        [
            _angles(sizes, axis, dims, theta, device)
            for axis, dims in enumerate(split_dim(dim, len(sizes)) if axes_dims is None else axes_dims)
        ],
        -1,
    )
    return angles.cos().float(), angles.sin().float()


def split_dim(dim: int, axes: int) -> list[int]:
    """Even parts of an even `dim` for the axes: equal ones, and what is left to the first."""
    part = dim // (2 * axes) * 2
    return [dim - part * (axes - 1)] + [part] * (axes - 1)


def _angles(sizes: Sequence[int], axis: int, dims: int, theta: float, device: torch.device | str | None) -> Tensor:
    """Of one axis, at every position of the grid: float64 [prod(sizes), dims / 2]."""
    exponents = torch.arange(0, dims, 2, dtype=torch.float64, device=device) / max(dims, 1)
    positions = torch.arange(sizes[axis], dtype=torch.float64, device=device)
    angles = torch.outer(positions, theta**-exponents)
    before, after = prod(sizes[:axis]), prod(sizes[axis + 1 :])
    grid = angles[None, :, None].expand(before, -1, after, -1)
    return grid.reshape(prod(sizes), angles.shape[1])
