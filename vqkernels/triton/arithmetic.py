"""What the kernels share: operations rounded as IEEE says, and sums in the orders of csrc/cpu/fixed_order.h."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROW_LANES = 256


def tile(dim: int) -> tuple[int, int]:
    """Rows and columns of the part of a [..., dim] tensor that one program works on: 512 elements."""
    columns = min(triton.next_power_of_2(dim), 64)
    return 512 // columns, columns


@triton.jit
def divide(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """The IEEE quotient: the operator is approximate for float32 on a GPU, and div_rn knows float32 only."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def square_root(x: tl.tensor) -> tl.tensor:
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def narrow(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Rounds to the nearest value of dtype, ties to even; bfloat16 by hand, since the interpreter cuts digits off."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def load_as(x: tl.tensor, inside: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """What the pointers x point to, 0 outside, in the type of the arithmetic."""
    return tl.load(x, mask=inside, other=0.0).to(dtype)


@triton.jit
def load_columns(
    rows: tl.tensor, inside: tl.tensor, first: tl.int64, dim: tl.int64, dtype: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tensor:
    """Columns from `first` on of the rows that the pointers `rows` [n] point to: [n, COLUMNS], 0 outside."""
    column = first + tl.arange(0, COLUMNS)
    return load_as(rows[:, None] + column[None, :], inside[:, None] & (column < dim)[None, :], dtype)


@triton.jit
def store_columns(
    rows: tl.tensor, inside: tl.tensor, first: tl.int64, dim: tl.int64, x: tl.tensor, COLUMNS: tl.constexpr
) -> None:
    """Stores x [n, COLUMNS] where `load_columns` would load it."""
    column = first + tl.arange(0, COLUMNS)
    x = narrow(x, rows.dtype.element_ty)
    tl.store(rows[:, None] + column[None, :], x, mask=inside[:, None] & (column < dim)[None, :])


@triton.jit
def load_code(index: tl.tensor, inside: tl.tensor, codes: tl.int64) -> tuple[tl.tensor, tl.tensor]:
    """Whether each index is that of a code, and the index, 0 where it is not."""
    value = tl.load(index, mask=inside, other=-1)
    is_code = (value >= 0) & (value < codes)
    return is_code, tl.where(is_code, value, 0)


@triton.jit
def pairwise_sum(x: tl.tensor, ROWS: tl.constexpr, LOG_LANES: tl.constexpr) -> tl.tensor:
    """[ROWS, lanes] -> [ROWS]: lane i with i + lanes/2, then halves again."""
    for i in tl.static_range(LOG_LANES):
        x = tl.sum(tl.reshape(x, (ROWS, 2, 1 << (LOG_LANES - 1 - i))), axis=1)
    return tl.reshape(x, (ROWS,))


@triton.jit(do_not_specialize=["size"])
def _column_sum_kernel(x: tl.tensor, total: tl.tensor, size: tl.int64, LANES: tl.constexpr) -> None:
    x += tl.program_id(0).to(tl.int64) * size
    lane = tl.arange(0, LANES)
    lanes = tl.zeros((LANES,), tl.float64)
    for i in tl.range(0, size, LANES, loop_unroll_factor=8):
        lanes += tl.load(x + i + lane, mask=i + lane < size, other=0.0).to(tl.float64)
    tl.store(total + tl.program_id(0) + tl.arange(0, 1), pairwise_sum(tl.reshape(lanes, (1, LANES)), 1, 8))


def column_sum(x: Tensor) -> Tensor:
    """[n, size], contiguous -> float64 [n]: lane i % 256 adds in ascending i, the lanes are added pairwise."""
    total = x.new_empty(x.shape[0], dtype=torch.float64)
    with torch.cuda.device_of(x):
        _column_sum_kernel[(x.shape[0],)](x, total, x.shape[1], LANES=_ROW_LANES)
    return total
