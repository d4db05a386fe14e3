"""Checks of arguments, and the one shape in which the kernels take them: z [H, N, D] and codebook [H, K, D]."""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels.reference._checks import FLOAT_TYPES, check_device, check_shape, check_tensor

METRICS = ("l2", "cosine", "dot")


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
