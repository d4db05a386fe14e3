"""A bias and GELU: the formulas of csrc/cpu/bias_gelu.h."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.reference._checks import FLOAT_TYPES
from vqkernels.triton._checks import check_like
from vqkernels.triton.activations import (
    activate,
    arguments_of,
    bias_gradient_of,
    empty_partials,
    gelu_of,
    load_biased,
    row_pointers,
    rows_of_program,
    store_rounded,
    store_sums,
    tile_of,
    triton_type,
)
from vqkernels.triton.arithmetic import load_columns
from vqkernels.triton.row_sums import columns_together


@triton.jit(do_not_specialize=["rows", "length"])
def _bias_gelu_kernel(
    x: tl.tensor,  # [batch, length, dim]
    bias: tl.tensor,  # [dim] or None
    y: tl.tensor,  # contiguous
    rows: tl.int64,
    length: tl.int64,
    dim: tl.int64,
    x_batch: tl.int64,
    x_row: tl.int64,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(dim, COLUMNS)
    first = program % blocks * COLUMNS
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    value = load_biased(row_pointers(x, row, length, x_batch, x_row), inside, bias, first, dim, WIDE, COLUMNS)
    store_rounded(y + row * dim, inside, first, dim, activate(value, ACTIVATION)[0], COLUMNS)


@triton.jit(do_not_specialize=["rows", "length", "rows_each"])
def _bias_gelu_backward_kernel(
    grad_y: tl.tensor,  # [batch, length, dim], as are
    x: tl.tensor,
    bias: tl.tensor,  # [dim] or None
    grad_x: tl.tensor,  # contiguous
    partials: tl.tensor,  # [chunks, dim] or None
    rows: tl.int64,
    length: tl.int64,
    dim: tl.int64,
    rows_each: tl.int64,
    grad_batch: tl.int64,
    grad_row: tl.int64,
    x_batch: tl.int64,
    x_row: tl.int64,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(dim, COLUMNS)
    chunk, first = program // blocks, program % blocks * COLUMNS
    end = tl.minimum((chunk + 1) * rows_each, rows)
    sums = tl.zeros((ROWS, COLUMNS), WIDE)
    for first_row in range(chunk * rows_each, end, ROWS):
        row = first_row + tl.arange(0, ROWS)
        inside = row < end
        value = load_biased(row_pointers(x, row, length, x_batch, x_row), inside, bias, first, dim, WIDE, COLUMNS)
        grad_rows = row_pointers(grad_y, row, length, grad_batch, grad_row)
        g = load_columns(grad_rows, inside, first, dim, WIDE, COLUMNS) * activate(value, ACTIVATION)[1]
        store_rounded(grad_x + row * dim, inside, first, dim, g, COLUMNS)
        if partials is not None:
            sums += tl.where(inside[:, None], g, 0.0)
    if partials is not None:
        store_sums(partials + chunk * dim, sums, first, dim, COLUMNS)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias), [B, L, D], rounded once."""
    a = arguments_of(x, bias)
    activation = gelu_of(approximate)
    _, length, dim = x.shape
    y = x.new_empty(x.shape, dtype=a.dtype)
    if y.numel():
        tile = tile_of(dim)
        with torch.cuda.device_of(x):
            _bias_gelu_kernel[(triton.cdiv(a.rows, tile["ROWS"]) * triton.cdiv(dim, tile["COLUMNS"]),)](
                *(a.x, a.bias, y, a.rows, length, dim, *a.x.stride()[:2]),
                ACTIVATION=activation,
                WIDE=triton_type(a.wide),
                **tile,
            )
    return y


def bias_gelu_backward(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, approximate: str, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x [B, L, D] and, where it is wanted, of the bias [D]."""
    a = arguments_of(x, bias)
    check_like("grad_y", grad_y, FLOAT_TYPES, x.shape, "x", x)
    activation, partials = gelu_of(approximate), empty_partials(a, bias_gradient)
    _, length, dim = x.shape
    grad_x = x.new_empty(x.shape)
    if grad_x.numel():
        tile, rows_each, grad_y = tile_of(dim), rows_of_program(a.rows), columns_together(grad_y)
        with torch.cuda.device_of(x):
            _bias_gelu_backward_kernel[(triton.cdiv(a.rows, rows_each) * triton.cdiv(dim, tile["COLUMNS"]),)](
                *(grad_y, a.x, a.bias, grad_x, partials, a.rows, length, dim, rows_each),
                *(*grad_y.stride()[:2], *a.x.stride()[:2]),
                ACTIVATION=activation,
                WIDE=triton_type(a.wide),
                **tile,
            )
    return grad_x, bias_gradient_of(a, partials)
