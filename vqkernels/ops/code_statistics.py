"""How many rows chose each code, and their sums."""

from math import prod

import torch
from torch import Tensor

from vqkernels import reference
from vqkernels.ops import _backend
from vqkernels.reference._checks import (
    FLOAT_TYPES,
    check_device,
    check_index_range,
    check_shape,
    check_tensor,
    describe,
)


def _shape_rule(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    heads, _, dim = z.shape
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return z.new_empty((heads, num_codes), dtype=torch.int64), z.new_empty((heads, num_codes, dim), dtype=dtype)


_backend.define("code_statistics(Tensor z, Tensor indices, int num_codes) -> (Tensor counts, Tensor sums)", _shape_rule)


def code_statistics(
    z: Tensor, indices: Tensor, num_codes: int, *, heads: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Counts the rows of every code and adds them up, in an order that nothing can change.

    The members of a code are taken in ascending row order in runs of 256 rows. A run is added up one row after the
    other in float32, the runs one after the other in float64, and the result is rounded once (float64 rows: float64
    throughout). The result is bitwise the same on CPU and CUDA, for any number of threads or blocks.

    Args:
        z: rows, [..., D], or [H, ..., D] with heads=True; float32, float64, bfloat16 or float16.
        indices: int64, the shape of z without its last dimension; -1 belongs to no code.
        num_codes: K, at least 1.
        heads: the first dimension of z counts heads, each with statistics of its own.
        backend: None (what suits the device), "native", "triton" or "reference".

    Returns:
        counts, int64 [K] ([H, K]), and sums, float32 [K, D] ([H, K, D]).

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, devices or backend do not fit, or num_codes is less than 1.
        IndexError: an index is neither -1 nor below num_codes. Looked at on CPU only: a CUDA device would have to be
            waited for, and ignores such rows.
        RuntimeError: the backend asked for cannot serve the call.
    """
    check_tensor("z", z, FLOAT_TYPES)
    check_tensor("indices", indices, (torch.int64,))
    check_device("indices", indices, "z", z)
    if not isinstance(num_codes, int | torch.SymInt):
        raise TypeError(f"num_codes: expected an integer, got {describe(num_codes)}")
    if num_codes < 1:
        raise ValueError(f"num_codes: expected at least 1, got {num_codes}")
    if z.ndim < (2 if heads else 1) or z.shape[-1] == 0:
        raise ValueError(f"z: expected shape {'[H, ..., D]' if heads else '[..., D]'}, got {list(z.shape)}")
    check_shape("indices", indices, z.shape[:-1], "z", z)
    backend = _backend.resolve(backend, z)
    if backend == "reference":
        check_index_range(indices, num_codes)  # the native kernel checks on its way
        counts, sums = reference.code_statistics(z, indices, num_codes, heads=heads)
        return counts, sums.float()
    num_heads = z.shape[0] if heads else 1
    rows = prod(indices.shape[1:] if heads else indices.shape)
    statistics = _backend.implementation("code_statistics", backend)
    counts, sums = statistics(
        z.detach().reshape(num_heads, rows, z.shape[-1]), indices.reshape(num_heads, rows), num_codes
    )
    sums = sums.float()
    return (counts, sums) if heads else (counts[0], sums[0])
