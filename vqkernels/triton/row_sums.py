"""What the operations of the norm chain share: rows as programs take them, and sums of them in a fixed order.

A program of a backward pass adds up consecutive rows in ascending order, in float32 (float64 for float64): rows of one
batch item, or all rows of several. What it has added up is a partial row; the partial rows of a sum are added in a
fixed order in float64 and rounded once. Neither depends on what runs beside it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.arithmetic import load_as, narrow

# Over what the gradient of a modulation is summed: nothing is wanted, or its shape is [1, 1, D], [B, 1, D], [B, L, D].
NO_GRADIENT, OF_ALL, OF_BATCH, OF_ROW = range(4)
_ALL, _BATCH, _ROW = tl.constexpr(OF_ALL), tl.constexpr(OF_BATCH), tl.constexpr(OF_ROW)

_PROGRAMS = 1024  # enough to fill a GPU, few enough for partial rows to be cheap
_LEAST_ROWS = 4
_SUM_LANES, _SUM_COLUMNS = 32, 32


class Chunks(NamedTuple):
    """How the rows [B, L] are shared out: `rows` of each of `items` batch items, `per_item` chunks in an item."""

    items: int
    rows: int
    per_item: int
    programs: int


def chunks_of(batch: int, length: int) -> Chunks:
    """At most 1024 programs, and one a batch item more."""
    rows = max(triton.cdiv(batch * length, _PROGRAMS), _LEAST_ROWS)
    if length <= rows:
        items = rows // max(length, 1)
        return Chunks(items, length, 1, triton.cdiv(batch, items) if length else 0)
    per_item = triton.cdiv(length, rows)
    return Chunks(1, rows, per_item, batch * per_item)


def row_block(dim: int) -> tuple[int, int]:
    """Columns of a whole row as a power of two, and the warps for them."""
    block = triton.next_power_of_2(dim)
    return block, min(max(block // 512, 1), 16)


@triton.jit
def load_row(x: tl.tensor, place: tl.int64, column: tl.tensor, dim: tl.int64, dtype: tl.constexpr) -> tl.tensor:
    return load_as(x + place + column, column < dim, dtype)


@triton.jit
def store_row(x: tl.tensor, place: tl.int64, column: tl.tensor, dim: tl.int64, value: tl.tensor) -> None:
    if x.dtype.element_ty == tl.bfloat16:
        value = value.to(tl.float32)
    tl.store(x + place + column, narrow(value, x.dtype.element_ty), mask=column < dim)


@triton.jit
def add_row(
    sums: tl.tensor,
    target: tl.tensor,  # as of `empty_sums`
    value: tl.tensor,
    place: tl.int64,
    column: tl.tensor,
    dim: tl.int64,
    LAYOUT: tl.constexpr,
) -> tl.tensor:
    """The sums with a row more; where nothing is summed, the row goes to its place."""
    if LAYOUT == _ROW:
        store_row(target, place, column, dim, value)
    elif target is not None:
        sums += value
    return sums


@triton.jit
def end_item(
    sums: tl.tensor, target: tl.tensor, place: tl.int64, column: tl.tensor, dim: tl.int64, LAYOUT: tl.constexpr
) -> tl.tensor:
    """The sums for the next batch item: zeros again where each item has its own."""
    if LAYOUT == _BATCH:
        store_row(target, place, column, dim, sums)
        sums = tl.zeros_like(sums)
    return sums


@triton.jit
def end_program(
    sums: tl.tensor, target: tl.tensor, place: tl.int64, column: tl.tensor, dim: tl.int64, LAYOUT: tl.constexpr
) -> None:
    if LAYOUT == _ALL:
        store_row(target, place, column, dim, sums)


@triton.jit(do_not_specialize=["count"])
def _sum_partials_kernel(
    partials: tl.tensor, total: tl.tensor, count: tl.int64, dim: tl.int64, LANES: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    """[groups, count, dim] -> [groups, dim]: lane i % LANES adds in ascending i, then the lanes are added."""
    blocks = tl.cdiv(dim, COLUMNS)
    group = tl.program_id(0).to(tl.int64) // blocks
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, LANES)
    lanes = tl.zeros((LANES, COLUMNS), tl.float64)
    for first in range(0, count, LANES):
        place = (group * count + first + lane)[:, None] * dim + column[None, :]
        inside = (first + lane < count)[:, None] & (column < dim)[None, :]
        lanes += load_as(partials + place, inside, tl.float64)
    sums = tl.sum(lanes, axis=0)
    if total.dtype.element_ty != tl.float64:
        sums = sums.to(tl.float32)
    store_row(total, group * dim, column, dim, sums)


def empty_sums(x: Tensor, layout: int, chunks: Chunks, dtype: torch.dtype, wide: torch.dtype) -> Tensor | None:
    """Where programs put what they add up of rows of x [B, L, D]: partial rows, or gradients `dtype` of rows."""
    batch, length, dim = x.shape
    if layout == NO_GRADIENT:
        return None
    if layout == OF_ROW:
        return x.new_empty((batch, length, dim), dtype=dtype)
    rows = chunks.programs if layout == OF_ALL else batch * chunks.per_item
    return (x.new_empty if chunks.programs else x.new_zeros)((rows, dim), dtype=wide)


def finished_sums(x: Tensor, partials: Tensor | None, layout: int, dtype: torch.dtype) -> Tensor:
    """Gradients [1, 1, D], [B, 1, D] or [B, L, D] of what was put into `empty_sums`; empty for `NO_GRADIENT`."""
    if partials is None:
        return x.new_empty(0, dtype=dtype)
    if layout == OF_ROW:
        return partials
    groups, dim = 1 if layout == OF_ALL else x.shape[0], x.shape[2]
    if partials.numel() == 0 or x.numel() == 0:
        return x.new_zeros((groups, 1, dim), dtype=dtype)
    total = x.new_empty((groups, 1, dim), dtype=dtype)
    with torch.cuda.device_of(x):
        _sum_partials_kernel[(groups * triton.cdiv(dim, _SUM_COLUMNS),)](
            partials, total, partials.shape[0] // groups, dim, LANES=_SUM_LANES, COLUMNS=_SUM_COLUMNS
        )
    return total


def columns_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def over_rows(modulation: Tensor | None, x: Tensor) -> Tensor | None:
    """A modulation [1, 1, D], [B, 1, D] or [B, L, D] as a view [B, L, D] whose columns lie side by side."""
    return None if modulation is None else columns_together(modulation).expand(x.shape)


def row_strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Strides of batch items and rows of tensors [B, L, D], 0 of one that is not there."""
    return tuple(stride for t in tensors for stride in ((0, 0) if t is None else t.stride()[:2]))
