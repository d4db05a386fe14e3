"""Code statistics: bitwise those of csrc/cpu/code_statistics.h, without atomics and without waiting for the device.

A stable sort brings the members of a code together in ascending row order. One kernel adds up runs of 256 members,
another the runs of a code; a code that many rows chose is many runs, so that it occupies many programs.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.reference._checks import FLOAT_TYPES
from vqkernels.triton._checks import check_base, check_like
from vqkernels.triton.arithmetic import tile

_RUN_LENGTH = 256


@triton.jit(do_not_specialize=["codes"])
def _sum_runs_kernel(
    z: tl.tensor,  # [heads * rows, dim]
    order: tl.tensor,  # [heads * rows], rows sorted by code
    offsets: tl.tensor,  # [codes + 1], where the members of a code begin in order
    run_offsets: tl.tensor,  # [codes + 1], where the runs of a code begin in runs
    run_codes: tl.tensor,  # the code of each run
    runs: tl.tensor,  # [at least run_offsets[codes], dim]
    codes: tl.int64,
    dim: tl.int64,
    RUN_LENGTH: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    column_blocks = tl.cdiv(dim, BLOCK_COLUMNS)
    run = program // column_blocks * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    column = program % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_inside = (column < dim)[None, :]
    run_inside = run < tl.load(run_offsets + codes)
    code = tl.load(run_codes + run, mask=run_inside, other=0)
    first = tl.load(offsets + code) + (run - tl.load(run_offsets + code)) * RUN_LENGTH
    length = tl.minimum(tl.load(offsets + code + 1) - first, RUN_LENGTH)
    length = tl.where(run_inside, length, 0)
    total = tl.zeros((BLOCK_RUNS, BLOCK_COLUMNS), runs.dtype.element_ty)
    for m in tl.range(0, tl.max(length, axis=0), loop_unroll_factor=4):
        row = tl.load(order + first + m, mask=m < length, other=0)
        mask = (m < length)[:, None] & column_inside
        total += tl.load(z + (row * dim)[:, None] + column[None, :], mask=mask, other=0.0).to(total.dtype)
    tl.store(runs + (run * dim)[:, None] + column[None, :], total, mask=run_inside[:, None] & column_inside)


@triton.jit(do_not_specialize=["codes"])
def _sum_codes_kernel(
    runs: tl.tensor,
    run_offsets: tl.tensor,
    sums: tl.tensor,  # [codes, dim]
    codes: tl.int64,
    dim: tl.int64,
    BLOCK_CODES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    column_blocks = tl.cdiv(dim, BLOCK_COLUMNS)
    code = program // column_blocks * BLOCK_CODES + tl.arange(0, BLOCK_CODES)
    column = program % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_inside = (column < dim)[None, :]
    code_inside = code < codes
    first = tl.load(run_offsets + code, mask=code_inside, other=0)
    length = tl.load(run_offsets + code + 1, mask=code_inside, other=0) - first
    total = tl.zeros((BLOCK_CODES, BLOCK_COLUMNS), tl.float64)
    for r in tl.range(0, tl.max(length, axis=0), loop_unroll_factor=4):
        mask = (r < length)[:, None] & column_inside
        total += tl.load(runs + ((first + r) * dim)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float64)
    out = sums + (code * dim)[:, None] + column[None, :]
    tl.store(out, total.to(sums.dtype.element_ty), mask=code_inside[:, None] & column_inside)


def code_statistics(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts, int64 [H, K], and sums, float32 (float64 for float64) [H, K, D], of z [H, N, D] and indices [H, N].

    Rows whose index is not a code belong to none.
    """
    check_base("z", z, FLOAT_TYPES, "[H, N, D]")
    torch._check(num_codes > 0, lambda: "vqkernels: expected num_codes of at least 1")
    check_like("indices", indices, (torch.int64,), z.shape[:2], "z", z)
    heads, rows, dim = z.shape
    z = z.contiguous()
    total_codes = heads * num_codes
    first_codes = num_codes * torch.arange(heads, device=z.device).unsqueeze(-1)
    is_code = (indices >= 0) & (indices < num_codes)
    codes, order = torch.where(is_code, indices + first_codes, total_codes).flatten().sort(stable=True)
    offsets = torch.searchsorted(codes, torch.arange(total_codes + 1, device=z.device))
    counts = offsets.diff()
    run_offsets = F.pad(((counts + (_RUN_LENGTH - 1)) // _RUN_LENGTH).cumsum(0), (1, 0))
    # As many runs as there can be: how many there are, the device alone knows.
    max_runs = heads * rows // _RUN_LENGTH + heads * min(rows, num_codes)
    run_codes = torch.searchsorted(run_offsets[1:], torch.arange(max_runs, device=z.device), right=True)

    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    runs = z.new_empty((max_runs, dim), dtype=dtype)
    sums = z.new_empty((heads, num_codes, dim), dtype=dtype)
    block, block_columns = tile(dim)
    column_blocks = triton.cdiv(dim, block_columns)
    with torch.cuda.device_of(z):
        _sum_runs_kernel[(triton.cdiv(max_runs, block) * column_blocks,)](
            z,
            order,
            offsets,
            run_offsets,
            run_codes,
            runs,
            total_codes,
            dim,
            RUN_LENGTH=_RUN_LENGTH,
            BLOCK_RUNS=block,
            BLOCK_COLUMNS=block_columns,
        )
        _sum_codes_kernel[(triton.cdiv(total_codes, block) * column_blocks,)](
            runs, run_offsets, sums, total_codes, dim, BLOCK_CODES=block, BLOCK_COLUMNS=block_columns
        )
    return counts.reshape(heads, num_codes), sums
