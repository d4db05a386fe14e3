"""Exact nearest-codebook search."""

from typing import Literal, overload

import torch
from torch import Tensor

from vqkernels import reference
from vqkernels.ops import _backend
from vqkernels.ops._checks import search_arguments


def _shape_rule(z: Tensor, codebook: Tensor, metric: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.float64 in (z.dtype, codebook.dtype)
    indices = z.new_empty(z.shape[:2], dtype=torch.int64)
    return indices, z.new_empty(z.shape[:2], dtype=torch.float64 if wide else torch.float32)


_backend.define(
    "nearest_code(Tensor z, Tensor codebook, str metric, Tensor? mask) -> (Tensor indices, Tensor scores)", _shape_rule
)


@overload
def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    mask: Tensor | None = ...,
    return_score: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    mask: Tensor | None = ...,
    return_score: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    return_score: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Finds, for every row of z, the nearest code of a codebook.

    The result of a row depends on that row and the codebook alone, bit for bit: not on the batch, the number of
    threads, the instruction set or, with native kernels on both, whether it is computed on CPU or CUDA. (Triton kernels
    choose a code within rounding of the best.) Scores are chains of fused multiply-adds in
    ascending d, in float32 (bfloat16 and float16 are widened exactly), or in float64 where z or codebook is float64:

        s(z, c) = fma(z[D-1], c[D-1], ... fma(z[0], c[0], bias(c))),   bias(c) = -|c|^2 / 2 for "l2", else 0

    The largest score wins, among equal scores the lowest index. For "l2" that is the smallest distance. No gradient
    flows through the search, and nothing of size rows x codes is stored.

    Args:
        z: rows, [..., D], or [H, ..., D] with one codebook a head; float32, float64, bfloat16 or float16.
        codebook: [K, D] or [H, K, D], K and D at least 1; any of these dtypes, on the device of z.
        metric: "l2" (Euclidean distance), "cosine" (codes are divided by their norm) or "dot" (inner product).
        mask: bool [...] (with heads also [H, ...]); rows where it is False get index -1.
        return_score: also return the best scores.
        backend: None (what suits the device), "native", "triton" or "reference".

    Returns:
        indices, int64 [...] ([H, ...]): -1 where the row is masked, or invalid (NaN, Inf, or a squared norm above a
        quarter of the largest float), or no code is valid; invalid codes are never chosen. With return_score also
        the scores, float32 (float64 for float64), -Inf where the index is -1.

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, devices, metric or backend do not fit.
        RuntimeError: the backend asked for cannot serve the call.
    """
    arguments = search_arguments(z, codebook, metric, mask)
    backend = _backend.resolve(backend, z)
    if backend == "reference":
        if return_score:
            return reference.nearest_code(z, codebook, metric=metric, mask=mask, return_score=True)
        return reference.nearest_code(z, codebook, metric=metric, mask=mask)
    search = _backend.implementation("nearest_code", backend)
    indices, scores = search(arguments.z.detach(), arguments.codebook.detach(), metric, arguments.mask)
    indices = indices.reshape(arguments.row_shape)
    return (indices, scores.reshape(arguments.row_shape)) if return_score else indices
