"""Checks of arguments, and the one shape in which the kernels take them: z [H, N, D] and codebook [H, K, D]."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels.reference._checks import (
    FLOAT_TYPES,
    INTEGER_TYPES,
    check_device,
    check_shape,
    check_tensor,
    describe,
)
from vqkernels.reference.residual_quantize import levels_of_rows, split_levels

METRICS = ("l2", "cosine", "dot")


def wide_type(*tensors: Tensor) -> torch.dtype:
    """What tensors are computed in: float64 where one of them is, else float32."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


class SearchArguments(NamedTuple):
    """Arguments as the kernels take them, and the shape of one index a row that the caller expects back."""

    z: Tensor  # [H, N, D]
    codebook: Tensor  # [H, K, D]
    mask: Tensor | None  # [H, N]
    row_shape: torch.Size


def search_arguments(z: Tensor, codebook: Tensor, metric: str, mask: Tensor | None) -> SearchArguments:
    """Checks z [..., D] with codebook [K, D], or z [H, ..., D] with codebook [H, K, D], and mask [...] or [H, ...]."""
    check_tensor("z", z, FLOAT_TYPES)
    check_tensor("codebook", codebook, FLOAT_TYPES)
    check_choice("metric", metric, METRICS)
    check_device("codebook", codebook, "z", z)
    if codebook.ndim not in (2, 3):
        raise ValueError(f"codebook: expected shape [K, D] or [H, K, D], got {list(codebook.shape)}")
    if z.ndim < codebook.ndim - 1:
        raise ValueError(
            f"z: expected shape [..., D], or [H, ..., D] with a codebook [H, K, D], got {list(z.shape)} "
            f"with codebook {list(codebook.shape)}"
        )
    *heads, codes, dim = codebook.shape
    if codes == 0 or dim == 0 or 0 in heads:
        raise ValueError(f"codebook: expected at least one head, code and dimension, got shape {list(codebook.shape)}")
    if z.shape[-1] != dim:
        expected = f"[{', '.join(map(str, [*heads, codes, z.shape[-1]]))}]"
        raise ValueError(
            f"codebook: expected shape {expected} to match z of shape {list(z.shape)}, got {list(codebook.shape)}"
        )
    if heads and z.shape[0] != heads[0]:
        raise ValueError(
            f"z: expected {heads[0]} heads in its first dimension to match codebook of shape {list(codebook.shape)}, "
            f"got shape {list(z.shape)}"
        )
    row_shape = z.shape[:-1]
    num_heads = heads[0] if heads else 1
    rows = prod(row_shape[1:] if heads else row_shape)
    if mask is not None:
        check_tensor("mask", mask, (torch.bool,))
        check_device("mask", mask, "z", z)
        if heads and mask.shape == row_shape[1:]:
            mask = mask.expand(row_shape)
        check_shape("mask", mask, row_shape, "z", z)
        mask = mask.reshape(num_heads, rows)
    return SearchArguments(z.reshape(num_heads, rows, dim), codebook.reshape(num_heads, codes, dim), mask, row_shape)


class ResidualArguments(NamedTuple):
    """Arguments as the kernels take them, and what the caller expects back."""

    z: Tensor  # [H, N, D]
    codebooks: Tensor  # [H, K_0 + K_1 + ..., D]
    sizes: tuple[int, ...]  # K_q
    mask: Tensor | None  # [H, N]
    num_levels: Tensor | None  # [H, N], int64
    row_shape: torch.Size
    heads: bool


def residual_arguments(
    z: Tensor, codebooks: Tensor | Sequence[Tensor], metric: str, mask: Tensor | None, num_levels: int | Tensor | None
) -> ResidualArguments:
    """Checks z [..., D] with codebooks [Q, K, D] or Q of [K_q, D], or z [H, ..., D] with one dimension H more."""
    levels = _codebook_levels(codebooks)
    first = search_arguments(z, levels[0], metric, mask)
    for q, level in enumerate(levels[1:], 1):
        *heads, _, dim = levels[0].shape
        if level.ndim != levels[0].ndim or [*level.shape[:-2], level.shape[-1]] != [*heads, dim] or 0 in level.shape:
            expected = ", ".join(map(str, [*heads, f"K_{q}", dim]))
            raise ValueError(
                f"codebooks: expected shape [{expected}] of level {q} to match level 0 of shape "
                f"{list(levels[0].shape)}, got {list(level.shape)}"
            )
        if level.dtype != levels[0].dtype or level.device != levels[0].device:
            raise ValueError(
                f"codebooks: expected one dtype and device, got {levels[0].dtype} on {levels[0].device} at level 0 and "
                f"{level.dtype} on {level.device} at level {q}"
            )
    num_heads, rows, dim = first.z.shape
    if isinstance(num_levels, Tensor):
        check_tensor("num_levels", num_levels, INTEGER_TYPES)
        check_device("num_levels", num_levels, "z", z)
        if num_levels.shape != first.row_shape[: num_levels.ndim]:
            raise ValueError(
                f"num_levels: expected a shape that is a leading part of {list(first.row_shape)}, the shape of the "
                f"rows, got {list(num_levels.shape)}"
            )
    elif num_levels is not None:
        if isinstance(num_levels, bool) or not isinstance(num_levels, int | torch.SymInt):
            raise TypeError(f"num_levels: expected None, an integer or a tensor, got {describe(num_levels)}")
        if not 0 <= num_levels <= len(levels):
            raise ValueError(f"num_levels: expected an integer from 0 to {len(levels)}, got {num_levels}")
    if isinstance(codebooks, Tensor):
        table = codebooks.reshape(num_heads, -1, dim)
    else:
        table = torch.cat([level.reshape(num_heads, -1, dim) for level in levels], 1)
    of_rows = levels_of_rows(num_levels, first.row_shape, z.device)
    return ResidualArguments(
        z=first.z,
        codebooks=table,
        sizes=tuple(level.shape[-2] for level in levels),
        mask=first.mask,
        num_levels=None if of_rows is None else of_rows.reshape(num_heads, rows),
        row_shape=first.row_shape,
        heads=levels[0].ndim == 3,
    )


def _codebook_levels(codebooks: object) -> list[Tensor]:
    if isinstance(codebooks, Tensor):
        check_tensor("codebooks", codebooks, FLOAT_TYPES)
        if codebooks.ndim not in (3, 4) or codebooks.shape[-3] == 0:
            raise ValueError(
                f"codebooks: expected shape [Q, K, D] or [H, Q, K, D] with at least one level, "
                f"got {list(codebooks.shape)}"
            )
    else:
        if not isinstance(codebooks, Sequence):
            raise TypeError(f"codebooks: expected a tensor or a sequence of tensors, got {describe(codebooks)}")
        if not codebooks:
            raise ValueError("codebooks: expected at least one level, got none")
        for q, level in enumerate(codebooks):
            check_tensor(f"codebooks[{q}]", level, FLOAT_TYPES)
    return split_levels(codebooks)
