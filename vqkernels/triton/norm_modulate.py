"""Layer or RMS normalization and the modulation that follows it, of rows or of a residual stream and a gated branch.

A program holds a whole row in registers, so that each tensor is read once; statistics take two passes over them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.reference._checks import FLOAT_TYPES
from vqkernels.triton._checks import check_base, check_like
from vqkernels.triton.arithmetic import divide, square_root
from vqkernels.triton.gate_residual import check_layouts, check_modulations, promoted, triton_type, wide_of
from vqkernels.triton.row_sums import (
    NO_GRADIENT,
    OF_ALL,
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


@triton.jit
def _affine(
    normalized: tl.tensor, weight: tl.tensor, bias: tl.tensor, column: tl.tensor, dim: tl.int64, WIDE: tl.constexpr
) -> tl.tensor:
    if weight is not None:
        normalized = normalized * load_row(weight, 0, column, dim, WIDE)
    if bias is not None:
        normalized += load_row(bias, 0, column, dim, WIDE)
    return normalized


@triton.jit(do_not_specialize=["length"])
def _norm_modulate_kernel(
    x: tl.tensor,  # [batch, length, dim], as are all but the statistics, weight and bias
    branch: tl.tensor,  # or None, as any input from here on
    gate: tl.tensor,
    shift: tl.tensor,
    scale: tl.tensor,
    shift2: tl.tensor,
    scale2: tl.tensor,
    weight: tl.tensor,  # [dim]
    bias: tl.tensor,
    residual: tl.tensor,  # contiguous, as all results; None without branch
    y: tl.tensor,
    y2: tl.tensor,  # or None
    mean: tl.tensor,  # [batch, length]; None: RMS
    rstd: tl.tensor,
    length: tl.int64,
    dim: tl.int64,
    eps: tl.float64,
    x_batch: tl.int64,
    x_row: tl.int64,
    branch_batch: tl.int64,
    branch_row: tl.int64,
    gate_batch: tl.int64,
    gate_row: tl.int64,
    shift_batch: tl.int64,
    shift_row: tl.int64,
    scale_batch: tl.int64,
    scale_row: tl.int64,
    shift2_batch: tl.int64,
    shift2_row: tl.int64,
    scale2_batch: tl.int64,
    scale2_row: tl.int64,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    item, row = program // length, program % length
    column = tl.arange(0, BLOCK)
    r = load_row(x, item * x_batch + row * x_row, column, dim, WIDE)
    if branch is not None:
        value = load_row(branch, item * branch_batch + row * branch_row, column, dim, WIDE)
        if gate is not None:
            value = value * load_row(gate, item * gate_batch + row * gate_row, column, dim, WIDE)
        r += value
        store_row(residual, program * dim, column, dim, r)
    columns = tl.full((), dim, WIDE)
    if mean is not None:
        row_mean = divide(tl.sum(r, axis=0), columns)
        r = tl.where(column < dim, r - row_mean, 0.0)
        tl.store(mean + program, row_mean)
    variance = divide(tl.sum(r * r, axis=0), columns)
    one = tl.full((), 1.0, WIDE)
    row_rstd = divide(one, square_root(variance + tl.full((), eps, WIDE)))
    tl.store(rstd + program, row_rstd)

    n = _affine(r * row_rstd, weight, bias, column, dim, WIDE)
    result = n
    if scale is not None:
        result = n * (1.0 + load_row(scale, item * scale_batch + row * scale_row, column, dim, WIDE))
    if shift is not None:
        result += load_row(shift, item * shift_batch + row * shift_row, column, dim, WIDE)
    store_row(y, program * dim, column, dim, result)
    if y2 is not None:
        result = n
        if scale2 is not None:
            result = n * (1.0 + load_row(scale2, item * scale2_batch + row * scale2_row, column, dim, WIDE))
        if shift2 is not None:
            result += load_row(shift2, item * shift2_batch + row * shift2_row, column, dim, WIDE)
        store_row(y2, program * dim, column, dim, result)


@triton.jit(do_not_specialize=["batch", "length", "items", "rows", "per_item"])
def _norm_modulate_backward_kernel(
    grad_y: tl.tensor,  # [batch, length, dim], as are all but the statistics, weight, bias and sums
    grad_y2: tl.tensor,  # or None, as any input but x, mean and rstd
    grad_residual: tl.tensor,
    x: tl.tensor,
    branch: tl.tensor,
    gate: tl.tensor,
    scale: tl.tensor,
    scale2: tl.tensor,
    weight: tl.tensor,  # [dim]
    bias: tl.tensor,
    mean: tl.tensor,  # [batch, length]; None: RMS
    rstd: tl.tensor,
    grad_x: tl.tensor,  # contiguous
    grad_branch: tl.tensor,  # contiguous, or None
    gate_sums: tl.tensor,  # partial rows, or contiguous gradients of rows, or None; these all
    shift_sums: tl.tensor,
    scale_sums: tl.tensor,
    shift2_sums: tl.tensor,
    scale2_sums: tl.tensor,
    weight_sums: tl.tensor,  # [programs, dim] or None
    bias_sums: tl.tensor,
    batch: tl.int64,
    length: tl.int64,
    dim: tl.int64,
    items: tl.int64,
    rows: tl.int64,
    per_item: tl.int64,
    grad_y_batch: tl.int64,
    grad_y_row: tl.int64,
    grad_y2_batch: tl.int64,
    grad_y2_row: tl.int64,
    grad_residual_batch: tl.int64,
    grad_residual_row: tl.int64,
    x_batch: tl.int64,
    x_row: tl.int64,
    branch_batch: tl.int64,
    branch_row: tl.int64,
    gate_batch: tl.int64,
    gate_row: tl.int64,
    scale_batch: tl.int64,
    scale_row: tl.int64,
    scale2_batch: tl.int64,
    scale2_row: tl.int64,
    GATE: tl.constexpr,  # layouts
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT2: tl.constexpr,
    SCALE2: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    first_item, chunk = program // per_item * items, program % per_item
    column = tl.arange(0, BLOCK)
    columns = tl.full((), dim, WIDE)
    none = tl.zeros((BLOCK,), WIDE)
    sum_gate, sum_weight, sum_bias = none, none, none
    sum_shift, sum_scale, sum_shift2, sum_scale2 = none, none, none, none
    for item in range(first_item, tl.minimum(first_item + items, batch)):
        for row in range(chunk * rows, tl.minimum(chunk * rows + rows, length)):
            index = item * length + row
            place = index * dim
            r = load_row(x, item * x_batch + row * x_row, column, dim, WIDE)
            if branch is not None:
                of_branch = load_row(branch, item * branch_batch + row * branch_row, column, dim, WIDE)
                of_gate = load_row(gate, item * gate_batch + row * gate_row, column, dim, WIDE)
                r += of_gate * of_branch
            if mean is not None:
                r = tl.where(column < dim, r - tl.load(mean + index), 0.0)
            row_rstd = tl.load(rstd + index)
            xhat = r * row_rstd
            n = _affine(xhat, weight, bias, column, dim, WIDE)

            g = load_row(grad_y, item * grad_y_batch + row * grad_y_row, column, dim, WIDE)
            dn = g
            if scale is not None:
                dn = g * (1.0 + load_row(scale, item * scale_batch + row * scale_row, column, dim, WIDE))
            sum_shift = add_row(sum_shift, shift_sums, g, place, column, dim, SHIFT)
            sum_scale = add_row(sum_scale, scale_sums, g * n, place, column, dim, SCALE)
            if grad_y2 is not None:
                g = load_row(grad_y2, item * grad_y2_batch + row * grad_y2_row, column, dim, WIDE)
                if scale2 is not None:
                    dn += g * (1.0 + load_row(scale2, item * scale2_batch + row * scale2_row, column, dim, WIDE))
                else:
                    dn += g
                sum_shift2 = add_row(sum_shift2, shift2_sums, g, place, column, dim, SHIFT2)
                sum_scale2 = add_row(sum_scale2, scale2_sums, g * n, place, column, dim, SCALE2)
            if weight_sums is not None:
                sum_weight += dn * xhat
            if bias_sums is not None:
                sum_bias += dn
            if weight is not None:
                dn = dn * load_row(weight, 0, column, dim, WIDE)
            # Columns that there are not have gradients 0, so they need no mask in the sums.
            dr = dn - xhat * divide(tl.sum(dn * xhat, axis=0), columns)
            if mean is not None:
                dr -= divide(tl.sum(dn, axis=0), columns)
            dr = dr * row_rstd
            if grad_residual is not None:
                dr += load_row(grad_residual, item * grad_residual_batch + row * grad_residual_row, column, dim, WIDE)
            store_row(grad_x, place, column, dim, dr)
            if branch is not None:
                store_row(grad_branch, place, column, dim, dr * of_gate)
                sum_gate = add_row(sum_gate, gate_sums, dr * of_branch, place, column, dim, GATE)
        partial = (item * per_item + chunk) * dim
        sum_gate = end_item(sum_gate, gate_sums, partial, column, dim, GATE)
        sum_shift = end_item(sum_shift, shift_sums, partial, column, dim, SHIFT)
        sum_scale = end_item(sum_scale, scale_sums, partial, column, dim, SCALE)
        sum_shift2 = end_item(sum_shift2, shift2_sums, partial, column, dim, SHIFT2)
        sum_scale2 = end_item(sum_scale2, scale2_sums, partial, column, dim, SCALE2)
    end_program(sum_gate, gate_sums, program * dim, column, dim, GATE)
    end_program(sum_shift, shift_sums, program * dim, column, dim, SHIFT)
    end_program(sum_scale, scale_sums, program * dim, column, dim, SCALE)
    end_program(sum_shift2, shift2_sums, program * dim, column, dim, SHIFT2)
    end_program(sum_scale2, scale2_sums, program * dim, column, dim, SCALE2)
    if weight_sums is not None:
        store_row(weight_sums, program * dim, column, dim, sum_weight)
    if bias_sums is not None:
        store_row(bias_sums, program * dim, column, dim, sum_bias)


def _check_norm(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None) -> None:
    torch._check(norm in ("layer", "rms"), lambda: f"vqkernels: unknown norm {norm}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_like(name, value, FLOAT_TYPES, x.shape[2:], "x", x)


def _contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else v.contiguous() for v in vectors]


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift2: Tensor | None,
    scale2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    two: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Residual (None without branch), y, y2, mean and rstd."""
    check_base("x", x, FLOAT_TYPES, "[B, L, D]")
    if branch is not None:
        check_like("branch", branch, FLOAT_TYPES, x.shape, "x", x)
    check_modulations(x, gate=gate, shift=shift, scale=scale, shift2=shift2, scale2=scale2)
    _check_norm(x, norm, weight, bias)
    batch, length, dim = x.shape
    residual = None if branch is None else x.new_empty(x.shape, dtype=promoted(x, branch, gate))
    dtype = promoted(x, branch, gate, shift, scale, shift2, scale2)
    wide = wide_of(x, branch, gate, shift, scale, shift2, scale2)
    y = x.new_empty(x.shape, dtype=dtype)
    y2 = x.new_empty(x.shape if two else 0, dtype=dtype)
    rstd = x.new_empty((batch, length), dtype=wide)
    mean = torch.empty_like(rstd) if norm == "layer" else rstd.new_empty(0)
    if x.numel() == 0:
        return residual, y, y2, mean, rstd
    rows = [columns_together(x), None if branch is None else columns_together(branch)]
    rows += [over_rows(value, x) for value in (gate, shift, scale, shift2, scale2)]
    block, warps = row_block(dim)
    with torch.cuda.device_of(x):
        _norm_modulate_kernel[(batch * length,)](
            *(*rows, *_contiguous(weight, bias), residual, y, y2 if two else None),
            *(mean if norm == "layer" else None, rstd, length, dim, eps, *row_strides(*rows)),
            WIDE=triton_type(wide),
            BLOCK=block,
            num_warps=warps,
        )
    return residual, y, y2, mean, rstd


def backward(
    grad_residual: Tensor | None,
    grad_y: Tensor,
    grad_y2: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    scale2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    layouts: list[int],
    affine: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, branch, gate, shift, scale, shift2, scale2, weight and bias; what is not wanted is empty."""
    check_base("x", x, FLOAT_TYPES, "[B, L, D]")
    given = {"grad_residual": grad_residual, "grad_y": grad_y, "grad_y2": grad_y2, "branch": branch}
    for name, value in given.items():
        if value is not None:
            check_like(name, value, FLOAT_TYPES, x.shape, "x", x)
    torch._check((branch is None) == (gate is None), lambda: "vqkernels: expected branch and gate, or neither")
    check_modulations(x, gate=gate, scale=scale, scale2=scale2)
    _check_norm(x, norm, weight, bias)
    check_layouts(*layouts)
    batch, length, dim = x.shape
    wide = rstd.dtype
    torch._check(wide in (torch.float32, torch.float64), lambda: f"vqkernels: expected float32 rstd, got {wide}")
    check_like("rstd", rstd, (wide,), (batch, length), "x", x)
    check_like("mean", mean, (wide,), (batch, length) if norm == "layer" else (0,), "x", x)

    chunks = chunks_of(batch, length)
    grad_x = x.new_empty(x.shape)
    grad_branch = None if branch is None else branch.new_empty(branch.shape)
    # Without a gate, or a second result, nothing of theirs is computed.
    absent = (gate is None, False, False, grad_y2 is None, grad_y2 is None)
    dtypes = [x.dtype if gate is None else gate.dtype] + [grad_y.dtype] * 4
    layouts = [NO_GRADIENT if not_there else n for n, not_there in zip(layouts, absent, strict=True)]
    sums = [empty_sums(x, n, chunks, dtype, wide) for n, dtype in zip(layouts, dtypes, strict=True)]
    wanted = [affine and p is not None for p in (weight, bias)]
    parameter_sums = [empty_sums(x, OF_ALL if w else NO_GRADIENT, chunks, wide, wide) for w in wanted]
    rows = [None if t is None else columns_together(t) for t in (grad_y, grad_y2, grad_residual, x, branch)]
    rows += [over_rows(value, x) for value in (gate, scale, scale2)]
    block, warps = row_block(dim)
    if chunks.programs:
        with torch.cuda.device_of(x):
            _norm_modulate_backward_kernel[(chunks.programs,)](
                *(*rows, *_contiguous(weight, bias)),
                *(mean.contiguous() if norm == "layer" else None, rstd.contiguous(), grad_x, grad_branch),
                *(*sums, *parameter_sums, batch, length, dim, *chunks[:3], *row_strides(*rows)),
                **dict(zip(("GATE", "SHIFT", "SCALE", "SHIFT2", "SCALE2"), layouts, strict=True)),
                WIDE=triton_type(wide),
                BLOCK=block,
                num_warps=warps,
            )
    of_modulations = [finished_sums(x, s, n, d) for s, n, d in zip(sums, layouts, dtypes, strict=True)]
    of_parameters = [
        finished_sums(x, s, OF_ALL, x.dtype if p is None else p.dtype).flatten()
        for p, s in zip((weight, bias), parameter_sums, strict=True)
    ]
    grad_branch = x.new_empty(0) if grad_branch is None else grad_branch
    return grad_x, grad_branch, *of_modulations, *of_parameters


def norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    shift2: Tensor | None,
    scale2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    two: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """norm(x) (1 + scale) + shift of x [B, L, D], and with shift2 and scale2 where `two`; mean and rstd [B, L].

    Modulations are [1, 1, D], [B, 1, D] or [B, L, D]. What is not computed (the second result, the mean of "rms") is
    an empty tensor.
    """
    return forward(x, None, None, shift, scale, shift2, scale2, weight, bias, norm, eps, two)[1:]


def norm_modulate_backward(
    grad_y: Tensor,
    grad_y2: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    scale2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    layouts: list[int],
    affine: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, shift, scale, shift2, scale2, weight and bias, summed as `layouts` say of the modulations."""
    grads = backward(
        *(None, grad_y, grad_y2, x, None, None, scale, scale2, weight, bias, mean, rstd, norm),
        *([NO_GRADIENT, *layouts], affine),
    )
    return grads[0], *grads[3:]
