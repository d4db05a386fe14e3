"""The k best codes of every row."""

import torch
from torch import Tensor

from vqkernels import reference
from vqkernels.ops import _backend
from vqkernels.ops._checks import search_arguments
from vqkernels.reference._checks import describe


def _shape_rule(z: Tensor, codebook: Tensor, k: int, metric: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.float64 in (z.dtype, codebook.dtype)
    shape = (*z.shape[:2], k)
    return (
        z.new_empty(shape, dtype=torch.int64),
        z.new_empty(shape, dtype=torch.float64 if wide else torch.float32),
    )


_backend.define(
    "topk_codes(Tensor z, Tensor codebook, int k, str metric, Tensor? mask) -> (Tensor indices, Tensor scores)",
    _shape_rule,
)


def topk_codes(
    z: Tensor,
    codebook: Tensor,
    k: int,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Finds, for every row of z, the k nearest codes of a codebook in descending order of their scores.

    Scores are those of `nearest_code`, with its promise: a result depends on the row and the codebook alone, bit for
    bit. Among equal scores the lower index comes first; k = 1 gives what `nearest_code` gives. No gradient flows
    through the search, and nothing of size rows x codes is stored.

    Args:
        z: rows, [..., D], or [H, ..., D] with one codebook a head; float32, float64, bfloat16 or float16.
        codebook: [K, D] or [H, K, D], K and D at least 1; any of these dtypes, on the device of z.
        k: how many codes a row, at least 1.
        metric: "l2" (Euclidean distance), "cosine" (codes are divided by their norm) or "dot" (inner product).
        mask: bool [...] (with heads also [H, ...]); rows where it is False get no codes.
        backend: None (what suits the device), "native", "triton" or "reference".

    Returns:
        indices, int64 [..., k], and scores, float32 [..., k] (float64 for float64). Where a row has fewer valid codes
        than k, or is masked or invalid (see `nearest_code`), the rest is -1 and -Inf.

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, devices, metric or backend do not fit, or k is less than 1.
        RuntimeError: the backend asked for cannot serve the call.
    """
    arguments = search_arguments(z, codebook, metric, mask)
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        raise TypeError(f"k: expected an integer, got {describe(k)}")
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    backend = _backend.resolve(backend, z)
    if backend == "reference":
        return reference.topk_codes(z, codebook, k, metric=metric, mask=mask)
    search = _backend.implementation("topk_codes", backend)
    indices, scores = search(arguments.z.detach(), arguments.codebook.detach(), k, metric, arguments.mask)
    return indices.reshape(*arguments.row_shape, k), scores.reshape(*arguments.row_shape, k)
