"""Vector quantization and its gradient: the formulas of csrc/cpu/vector_quantize.h, the choice of `nearest_code`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.reference._checks import FLOAT_TYPES
from vqkernels.triton._checks import check_like
from vqkernels.triton.arithmetic import column_sum, divide, narrow, pairwise_sum, square_root
from vqkernels.triton.nearest_code import search, search_inputs

_BLOCK_ROWS = 32


@triton.jit(do_not_specialize=["heads", "rows", "codes"])
def _quantize_kernel(
    z: tl.tensor,  # [heads, rows, dim]
    codebook: tl.tensor,  # [heads, codes, dim]
    indices: tl.tensor,  # [heads, rows]
    mask: tl.tensor,  # [heads, rows] or None
    quantized: tl.tensor,  # [heads, rows, dim]
    errors: tl.tensor,  # [heads, rows]
    heads: tl.int64,
    rows: tl.int64,
    codes: tl.int64,
    dim: tl.int64,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = row < heads * rows
    index = tl.load(indices + row, mask=row_inside, other=-1)
    is_code = (index >= 0) & (index < codes)
    has_code = is_code[:, None]
    code = row // rows * codes + tl.where(is_code, index, 0)
    fill = tl.full((BLOCK_ROWS,), float("nan"), errors.dtype.element_ty)
    if mask is not None:
        fill = tl.where(tl.load(mask + row, mask=row_inside, other=0) != 0, fill, 0.0)
    lanes = tl.zeros((BLOCK_ROWS, 16), errors.dtype.element_ty)
    for d in range(0, dim, 16):
        column = (d + tl.arange(0, 16))[None, :]
        inside = row_inside[:, None] & (column < dim)
        place = (row * dim)[:, None] + column
        e = tl.load(z + place, mask=inside & has_code, other=0.0).to(lanes.dtype)
        c = tl.load(codebook + (code * dim)[:, None] + column, mask=inside & has_code, other=0.0).to(lanes.dtype)
        lanes = tl.fma(e - c, e - c, lanes)
        value = narrow(tl.where(has_code, c, fill[:, None]), quantized.dtype.element_ty)
        tl.store(quantized + place, value, mask=inside)
    tl.store(errors + row, pairwise_sum(lanes, BLOCK_ROWS, 4), mask=row_inside)


@triton.jit(do_not_specialize=["heads", "rows", "codes"])
def _quantize_backward_kernel(
    grad_quantized: tl.tensor,  # [heads, rows, dim] or None: zero
    z: tl.tensor,  # [heads, rows, dim]
    codebook: tl.tensor,  # [heads, codes, dim]
    indices: tl.tensor,  # [heads, rows]
    coefficient: tl.tensor,  # [], of (e - c) in the gradient
    grad_z: tl.tensor,  # [heads, rows, dim]
    heads: tl.int64,
    rows: tl.int64,
    codes: tl.int64,
    dim: tl.int64,
    ROTATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = row < heads * rows
    index = tl.load(indices + row, mask=row_inside, other=-1)
    is_code = (index >= 0) & (index < codes)
    has_code = is_code[:, None]
    code_row = codebook + ((row // rows * codes + tl.where(is_code, index, 0)) * dim)[:, None]
    z_row = z + (row * dim)[:, None]
    factor = tl.load(coefficient)
    lane = tl.arange(0, 16)[None, :]

    if ROTATE:
        grad_row = grad_quantized + (row * dim)[:, None]
        e_lanes = tl.zeros((BLOCK_ROWS, 16), factor.dtype)
        c_lanes = tl.zeros_like(e_lanes)
        for d in range(0, dim, 16):
            inside = has_code & (d + lane < dim)
            e = tl.load(z_row + d + lane, mask=inside, other=0.0).to(factor.dtype)
            c = tl.load(code_row + d + lane, mask=inside, other=0.0).to(factor.dtype)
            e_lanes = tl.fma(e, e, e_lanes)
            c_lanes = tl.fma(c, c, c_lanes)
        norm_c = square_root(pairwise_sum(c_lanes, BLOCK_ROWS, 4))[:, None]
        divisor_e = tl.maximum(square_root(pairwise_sum(e_lanes, BLOCK_ROWS, 4))[:, None], 1e-6)
        divisor_c = tl.maximum(norm_c, 1e-6)

        w_lanes = tl.zeros_like(e_lanes)
        gw_lanes = tl.zeros_like(e_lanes)
        gq_lanes = tl.zeros_like(e_lanes)
        for d in range(0, dim, 16):
            inside = has_code & (d + lane < dim)
            e = tl.load(z_row + d + lane, mask=inside, other=0.0).to(factor.dtype)
            c = tl.load(code_row + d + lane, mask=inside, other=0.0).to(factor.dtype)
            g = tl.load(grad_row + d + lane, mask=inside, other=0.0).to(factor.dtype)
            q = divide(c, divisor_c)
            w = divide(e, divisor_e) + q
            w_lanes = tl.fma(w, w, w_lanes)
            gw_lanes = tl.fma(g, w, gw_lanes)
            gq_lanes = tl.fma(g, q, gq_lanes)
        divisor_w = tl.maximum(square_root(pairwise_sum(w_lanes, BLOCK_ROWS, 4))[:, None], 1e-6)
        gw = divide(pairwise_sum(gw_lanes, BLOCK_ROWS, 4)[:, None], divisor_w)
        gq = pairwise_sum(gq_lanes, BLOCK_ROWS, 4)[:, None]
        scale = divide(norm_c, divisor_e)

    for d in range(0, dim, 16):
        inside = has_code & (d + lane < dim)
        e = tl.load(z_row + d + lane, mask=inside, other=0.0).to(factor.dtype)
        c = tl.load(code_row + d + lane, mask=inside, other=0.0).to(factor.dtype)
        gradient = factor * (e - c)
        if grad_quantized is not None:
            g = tl.load(grad_quantized + (row * dim)[:, None] + d + lane, mask=inside, other=0.0).to(factor.dtype)
            if ROTATE:
                u = divide(e, divisor_e)
                w = divide(u + divide(c, divisor_c), divisor_w)
                g = scale * (g - 2 * gw * w + 2 * gq * u)
            gradient += g
        gradient = narrow(tl.where(has_code, gradient, 0.0), grad_z.dtype.element_ty)
        tl.store(grad_z + (row * dim)[:, None] + d + lane, gradient, mask=row_inside[:, None] & (d + lane < dim))


def vector_quantize(
    z: Tensor, codebook: Tensor, metric: str, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes z [H, N, D] with codebook [H, K, D].

    Returns quantized [H, N, D] in z's dtype, indices int64 [H, N], mse (scalar, float32, float64 for float64) over the
    rows that have a code, and the number of these rows (scalar, int64).
    """
    inputs = search_inputs(z, codebook, mask)
    indices, errors = search(inputs, metric)
    heads, rows, dim = z.shape
    quantized = torch.empty_like(inputs.z)
    with torch.cuda.device_of(z):
        # A row's score is not needed once its index is known: its place takes the row's error.
        _quantize_kernel[(triton.cdiv(heads * rows, _BLOCK_ROWS),)](
            inputs.z,
            inputs.codebook,
            indices,
            inputs.mask,
            quantized,
            errors,
            heads,
            rows,
            codebook.shape[1],
            dim,
            BLOCK_ROWS=_BLOCK_ROWS,
        )
    valid_rows = (indices >= 0).sum()
    mse = column_sum(errors.reshape(1, -1))[0] / (valid_rows * dim).clamp(min=1)
    return quantized.to(z.dtype), indices, mse.to(inputs.dtype), valid_rows


def vector_quantize_backward(
    grad_quantized: Tensor | None,
    grad_mse: Tensor | None,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    valid_rows: Tensor,
    gradient: str,
) -> Tensor:
    """The gradient of z [H, N, D], in z's dtype, from those of quantized [H, N, D] and mse (None: zero)."""
    inputs = search_inputs(z, codebook, None)
    heads, rows, dim = z.shape
    torch._check(
        gradient in ("straight_through", "rotation", "none"), lambda: f"vqkernels: unknown gradient {gradient}"
    )
    check_like("indices", indices, (torch.int64,), (heads, rows), "z", z)
    check_like("valid_rows", valid_rows, (torch.int64,), (), "z", z)
    if grad_quantized is not None:
        check_like("grad_quantized", grad_quantized, FLOAT_TYPES, z.shape, "z", z)
        grad_quantized = None if gradient == "none" else grad_quantized.to(inputs.z.dtype).contiguous()
    if grad_mse is None:
        coefficient = z.new_zeros((), dtype=inputs.dtype)
    else:
        check_like("grad_mse", grad_mse, (inputs.dtype,), (), "z", z)
        coefficient = (grad_mse.double() * 2 / (valid_rows * dim).clamp(min=1)).to(inputs.dtype)
    grad_z = torch.empty_like(inputs.z)
    with torch.cuda.device_of(z):
        _quantize_backward_kernel[(triton.cdiv(heads * rows, _BLOCK_ROWS),)](
            grad_quantized,
            inputs.z,
            inputs.codebook,
            indices.contiguous(),
            coefficient,
            grad_z,
            heads,
            rows,
            codebook.shape[1],
            dim,
            ROTATE=gradient == "rotation" and grad_quantized is not None,
            BLOCK_ROWS=_BLOCK_ROWS,
        )
    return grad_z.to(z.dtype)
