"""One half of each row times the activation of the other: the formulas of csrc/cpu/gated_activation.h."""

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
def _gated_activation_kernel(
    x: tl.tensor,  # [batch, length, 2 dim]
    bias: tl.tensor,  # [2 dim] or None
    y: tl.tensor,  # [batch, length, dim], contiguous
    rows: tl.int64,
    length: tl.int64,
    dim: tl.int64,
    x_batch: tl.int64,
    x_row: tl.int64,
    GATE_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(dim, COLUMNS)
    first = program % blocks * COLUMNS
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    x_rows = row_pointers(x, row, length, x_batch, x_row)
    left = load_biased(x_rows, inside, bias, first, dim, WIDE, COLUMNS)
    right = load_biased(x_rows + dim, inside, None if bias is None else bias + dim, first, dim, WIDE, COLUMNS)
    gate, other = (left, right) if GATE_FIRST else (right, left)
    store_rounded(y + row * dim, inside, first, dim, other * activate(gate, ACTIVATION)[0], COLUMNS)


@triton.jit(do_not_specialize=["rows", "length", "rows_each"])
def _gated_activation_backward_kernel(
    grad_y: tl.tensor,  # [batch, length, dim]
    x: tl.tensor,  # [batch, length, 2 dim]
    bias: tl.tensor,  # [2 dim] or None
    grad_x: tl.tensor,  # [batch, length, 2 dim], contiguous
    partials: tl.tensor,  # [chunks, 2 dim] or None
    rows: tl.int64,
    length: tl.int64,
    dim: tl.int64,
    rows_each: tl.int64,
    grad_batch: tl.int64,
    grad_row: tl.int64,
    x_batch: tl.int64,
    x_row: tl.int64,
    GATE_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(dim, COLUMNS)
    chunk, first = program // blocks, program % blocks * COLUMNS
    end = tl.minimum((chunk + 1) * rows_each, rows)
    left_sums = tl.zeros((ROWS, COLUMNS), WIDE)
    right_sums = tl.zeros((ROWS, COLUMNS), WIDE)
    for first_row in range(chunk * rows_each, end, ROWS):
        row = first_row + tl.arange(0, ROWS)
        inside = row < end
        x_rows = row_pointers(x, row, length, x_batch, x_row)
        left = load_biased(x_rows, inside, bias, first, dim, WIDE, COLUMNS)
        right = load_biased(x_rows + dim, inside, None if bias is None else bias + dim, first, dim, WIDE, COLUMNS)
        g = load_columns(row_pointers(grad_y, row, length, grad_batch, grad_row), inside, first, dim, WIDE, COLUMNS)
        gate, other = (left, right) if GATE_FIRST else (right, left)
        value, slope = activate(gate, ACTIVATION)
        grad_other, grad_gate = g * value, g * other * slope
        grad_left, grad_right = (grad_gate, grad_other) if GATE_FIRST else (grad_other, grad_gate)
        store_rounded(grad_x + row * 2 * dim, inside, first, dim, grad_left, COLUMNS)
        store_rounded(grad_x + row * 2 * dim + dim, inside, first, dim, grad_right, COLUMNS)
        if partials is not None:
            left_sums += tl.where(inside[:, None], grad_left, 0.0)
            right_sums += tl.where(inside[:, None], grad_right, 0.0)
    if partials is not None:
        store_sums(partials + chunk * 2 * dim, left_sums, first, dim, COLUMNS)
        store_sums(partials + chunk * 2 * dim + dim, right_sums, first, dim, COLUMNS)


def _dim_of(x: Tensor, gate: str) -> int:
    torch._check(gate in ("first", "second"), lambda: f"vqkernels: unknown gate {gate}")
    torch._check(x.shape[2] % 2 == 0, lambda: "vqkernels: expected x [B, L, 2 D]")
    return x.shape[2] // 2


def gated_activation(x: Tensor, bias: Tensor | None, gate: str, activation: int) -> Tensor:
    """U act(g) of x + bias = [u, g], or [g, u] where the first half is the gate: [B, L, D], rounded once."""
    a = arguments_of(x, bias)
    batch, length, dim = *x.shape[:2], _dim_of(x, gate)
    y = x.new_empty((batch, length, dim), dtype=a.dtype)
    if y.numel():
        tile = tile_of(dim)
        with torch.cuda.device_of(x):
            _gated_activation_kernel[(triton.cdiv(a.rows, tile["ROWS"]) * triton.cdiv(dim, tile["COLUMNS"]),)](
                *(a.x, a.bias, y, a.rows, length, dim, *a.x.stride()[:2]),
                GATE_FIRST=gate == "first",
                ACTIVATION=activation,
                WIDE=triton_type(a.wide),
                **tile,
            )
    return y


def gated_activation_backward(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, gate: str, activation: int, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x [B, L, 2 D] and, where it is wanted, of the bias [2 D]."""
    a = arguments_of(x, bias)
    batch, length, dim = *x.shape[:2], _dim_of(x, gate)
    check_like("grad_y", grad_y, FLOAT_TYPES, (batch, length, dim), "x", x)
    partials = empty_partials(a, bias_gradient)
    grad_x = x.new_empty(x.shape)
    if grad_x.numel():
        tile, rows_each, grad_y = tile_of(dim), rows_of_program(a.rows), columns_together(grad_y)
        with torch.cuda.device_of(x):
            _gated_activation_backward_kernel[(triton.cdiv(a.rows, rows_each) * triton.cdiv(dim, tile["COLUMNS"]),)](
                *(grad_y, a.x, a.bias, grad_x, partials, a.rows, length, dim, rows_each),
                *(*grad_y.stride()[:2], *a.x.stride()[:2]),
                GATE_FIRST=gate == "first",
                ACTIVATION=activation,
                WIDE=triton_type(a.wide),
                **tile,
            )
    return grad_x, bias_gradient_of(a, partials)
