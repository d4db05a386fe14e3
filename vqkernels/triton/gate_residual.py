"""A gated branch added to the residual stream."""

from functools import reduce

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.reference._checks import FLOAT_TYPES
from vqkernels.triton._checks import check_base, check_like
from vqkernels.triton.row_sums import (
    NO_GRADIENT,
    OF_ROW,
    add_row,
    chunks_of,
    columns_together,
    empty_sums,
    end_item,
    end_program,
    finished_sums,
    load_row,
    over_rows,
    row_block,
    row_strides,
    store_row,
)


@triton.jit(do_not_specialize=["length"])
def _gate_residual_kernel(
    x: tl.tensor,  # [batch, length, dim], as are all
    branch: tl.tensor,
    gate: tl.tensor,
    residual: tl.tensor,  # contiguous
    length: tl.int64,
    dim: tl.int64,
    x_batch: tl.int64,
    x_row: tl.int64,
    branch_batch: tl.int64,
    branch_row: tl.int64,
    gate_batch: tl.int64,
    gate_row: tl.int64,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    item, row = program // length, program % length
    column = tl.arange(0, BLOCK)
    value = load_row(branch, item * branch_batch + row * branch_row, column, dim, WIDE)
    value = value * load_row(gate, item * gate_batch + row * gate_row, column, dim, WIDE)
    value += load_row(x, item * x_batch + row * x_row, column, dim, WIDE)
    store_row(residual, program * dim, column, dim, value)


@triton.jit(do_not_specialize=["batch", "length", "items", "rows", "per_item"])
def _gate_residual_backward_kernel(
    grad: tl.tensor,  # [batch, length, dim], as are branch, gate and
    branch: tl.tensor,
    gate: tl.tensor,
    grad_branch: tl.tensor,  # contiguous
    gate_sums: tl.tensor,  # partial rows, or as grad_branch, or None
    batch: tl.int64,
    length: tl.int64,
    dim: tl.int64,
    items: tl.int64,
    rows: tl.int64,
    per_item: tl.int64,
    grad_batch: tl.int64,
    grad_row: tl.int64,
    branch_batch: tl.int64,
    branch_row: tl.int64,
    gate_batch: tl.int64,
    gate_row: tl.int64,
    LAYOUT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    first_item, chunk = program // per_item * items, program % per_item
    column = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), WIDE)
    for item in range(first_item, tl.minimum(first_item + items, batch)):
        for row in range(chunk * rows, tl.minimum(chunk * rows + rows, length)):
            g = load_row(grad, item * grad_batch + row * grad_row, column, dim, WIDE)
            factor = load_row(gate, item * gate_batch + row * gate_row, column, dim, WIDE)
            place = (item * length + row) * dim
            store_row(grad_branch, place, column, dim, g * factor)
            if gate_sums is not None:
                value = g * load_row(branch, item * branch_batch + row * branch_row, column, dim, WIDE)
                sums = add_row(sums, gate_sums, value, place, column, dim, LAYOUT)
        sums = end_item(sums, gate_sums, (item * per_item + chunk) * dim, column, dim, LAYOUT)
    end_program(sums, gate_sums, program * dim, column, dim, LAYOUT)


def wide_of(*tensors: Tensor | None) -> torch.dtype:
    """What tensors are computed in: float64 where one of them is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def triton_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def check_modulations(x: Tensor, **modulations: Tensor | None) -> None:
    """Checks for shapes [1, 1, D], [B, 1, D] and [B, L, D] of modulations of x [B, L, D]."""
    batch, length, dim = x.shape
    for name, value in modulations.items():
        if value is not None:
            shape = {3: (1 if value.shape[0] == 1 else batch, 1 if value.shape[1] == 1 else length, dim)}
            check_like(name, value, FLOAT_TYPES, shape.get(value.ndim, (batch, 1, dim)), "x", x)


def check_layouts(*layouts: int) -> None:
    known = range(NO_GRADIENT, OF_ROW + 1)
    torch._check(all(n in known for n in layouts), lambda: f"vqkernels: unknown layouts of gradients {layouts}")


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of a sum of tensors."""
    return reduce(torch.promote_types, [t.dtype for t in tensors if t is not None])


def gate_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """The sum x + gate * branch, rounded once, [B, L, D]; the gate is [1, 1, D], [B, 1, D] or [B, L, D]."""
    check_base("x", x, FLOAT_TYPES, "[B, L, D]")
    check_like("branch", branch, FLOAT_TYPES, x.shape, "x", x)
    check_modulations(x, gate=gate)
    batch, length, dim = x.shape
    residual = x.new_empty(x.shape, dtype=promoted(x, branch, gate))
    if x.numel() == 0:
        return residual
    inputs = (columns_together(x), columns_together(branch), over_rows(gate, x))
    block, warps = row_block(dim)
    with torch.cuda.device_of(x):
        _gate_residual_kernel[(batch * length,)](
            *(*inputs, residual, length, dim, *row_strides(*inputs)),
            WIDE=triton_type(residual.dtype),
            BLOCK=block,
            num_warps=warps,
        )
    return residual


def gate_residual_backward(grad_residual: Tensor, branch: Tensor, gate: Tensor, layout: int) -> tuple[Tensor, Tensor]:
    """Gradients of branch [B, L, D] and, summed as `layout` says, of the gate."""
    check_base("grad_residual", grad_residual, FLOAT_TYPES, "[B, L, D]")
    check_like("branch", branch, FLOAT_TYPES, grad_residual.shape, "grad_residual", grad_residual)
    check_modulations(grad_residual, gate=gate)
    check_layouts(layout)
    batch, length, dim = branch.shape
    wide = wide_of(grad_residual, branch, gate)
    chunks = chunks_of(batch, length)
    grad_branch = branch.new_empty(branch.shape)
    sums = empty_sums(branch, layout, chunks, gate.dtype, wide)
    inputs = (columns_together(grad_residual), columns_together(branch), over_rows(gate, branch))
    block, warps = row_block(dim)
    if chunks.programs:
        with torch.cuda.device_of(branch):
            _gate_residual_backward_kernel[(chunks.programs,)](
                *(*inputs, grad_branch, sums, batch, length, dim, *chunks[:3], *row_strides(*inputs)),
                LAYOUT=layout,
                WIDE=triton_type(wide),
                BLOCK=block,
                num_warps=warps,
            )
    return grad_branch, finished_sums(branch, sums, layout, gate.dtype)
