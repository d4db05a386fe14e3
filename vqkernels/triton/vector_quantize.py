"""Vector quantization and its gradient: the formulas of csrc/cpu/vector_quantize.h, the choice of `nearest_code`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.reference._checks import FLOAT_TYPES
from vqkernels.triton._checks import check_like
from vqkernels.triton.arithmetic import (
    column_sum,
    divide,
    load_code,
    load_columns,
    pairwise_sum,
    square_root,
    store_columns,
)
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
    has_code, index = load_code(indices + row, row_inside, codes)
    code_row = codebook + (row // rows * codes + index) * dim
    fill = tl.full((BLOCK_ROWS,), float("nan"), errors.dtype.element_ty)
    if mask is not None:
        fill = tl.where(tl.load(mask + row, mask=row_inside, other=0) != 0, fill, 0.0)
    lanes = tl.zeros((BLOCK_ROWS, 16), errors.dtype.element_ty)
    for d in range(0, dim, 16):
        e = load_columns(z + row * dim, has_code, d, dim, lanes.dtype, 16)
        c = load_columns(code_row, has_code, d, dim, lanes.dtype, 16)
        lanes = tl.fma(e - c, e - c, lanes)
        value = tl.where(has_code[:, None], c, fill[:, None])
        store_columns(quantized + row * dim, row_inside, d, dim, value, 16)
    tl.store(errors + row, pairwise_sum(lanes, BLOCK_ROWS, 4), mask=row_inside)


@triton.jit
def rotation(
    e_row: tl.tensor,  # [BLOCK_ROWS], pointers to rows,
    c_row: tl.tensor,  # to their codes,
    g_row: tl.tensor,  # and to the gradients of what they are quantized to
    has_code: tl.tensor,  # [BLOCK_ROWS]
    dim: tl.int64,
    dtype: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What `rotate_back` needs to know of the rows, [BLOCK_ROWS, 1] each."""
    e_lanes = tl.zeros((BLOCK_ROWS, 16), dtype)
    c_lanes = tl.zeros_like(e_lanes)
    for d in range(0, dim, 16):
        e = load_columns(e_row, has_code, d, dim, dtype, 16)
        c = load_columns(c_row, has_code, d, dim, dtype, 16)
        e_lanes = tl.fma(e, e, e_lanes)
        c_lanes = tl.fma(c, c, c_lanes)
    norm_c = square_root(pairwise_sum(c_lanes, BLOCK_ROWS, 4))[:, None]
    divisor_e = tl.maximum(square_root(pairwise_sum(e_lanes, BLOCK_ROWS, 4))[:, None], 1e-6)
    divisor_c = tl.maximum(norm_c, 1e-6)

    w_lanes = tl.zeros_like(e_lanes)
    gw_lanes = tl.zeros_like(e_lanes)
    gq_lanes = tl.zeros_like(e_lanes)
    for d in range(0, dim, 16):
        e = load_columns(e_row, has_code, d, dim, dtype, 16)
        c = load_columns(c_row, has_code, d, dim, dtype, 16)
        g = load_columns(g_row, has_code, d, dim, dtype, 16)
        q = divide(c, divisor_c)
        w = divide(e, divisor_e) + q
        w_lanes = tl.fma(w, w, w_lanes)
        gw_lanes = tl.fma(g, w, gw_lanes)
        gq_lanes = tl.fma(g, q, gq_lanes)
    divisor_w = tl.maximum(square_root(pairwise_sum(w_lanes, BLOCK_ROWS, 4))[:, None], 1e-6)
    gw = divide(pairwise_sum(gw_lanes, BLOCK_ROWS, 4)[:, None], divisor_w)
    gq = pairwise_sum(gq_lanes, BLOCK_ROWS, 4)[:, None]
    return divisor_e, divisor_c, divisor_w, gw, gq, divide(norm_c, divisor_e)


@triton.jit
def rotate_back(g: tl.tensor, e: tl.tensor, c: tl.tensor, turn: tl.tuple) -> tl.tensor:
    """Takes the gradient of a code to that of the row it was rotated from: columns [BLOCK_ROWS, 16] each."""
    divisor_e, divisor_c, divisor_w, gw, gq, scale = turn
    u = divide(e, divisor_e)
    w = divide(u + divide(c, divisor_c), divisor_w)
    return scale * (g - 2 * gw * w + 2 * gq * u)


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
    has_code, index = load_code(indices + row, row_inside, codes)
    code_row = codebook + (row // rows * codes + index) * dim
    place = row * dim
    factor = tl.load(coefficient)
    if ROTATE:
        turn = rotation(z + place, code_row, grad_quantized + place, has_code, dim, factor.dtype, BLOCK_ROWS)
    for d in range(0, dim, 16):
        e = load_columns(z + place, has_code, d, dim, factor.dtype, 16)
        c = load_columns(code_row, has_code, d, dim, factor.dtype, 16)
        gradient = factor * (e - c)
        if grad_quantized is not None:
            g = load_columns(grad_quantized + place, has_code, d, dim, factor.dtype, 16)
            if ROTATE:
                g = rotate_back(g, e, c, turn)
            gradient += g
        store_columns(grad_z + place, row_inside, d, dim, tl.where(has_code[:, None], gradient, 0.0), 16)


def check_gradient(gradient: str) -> None:
    known = ("straight_through", "rotation", "none")
    torch._check(gradient in known, lambda: f"vqkernels: unknown gradient {gradient}")


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
    check_gradient(gradient)
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
            enable_fp_fusion=False,  # products are rounded before they are added up, as on a CPU
        )
    return grad_z.to(z.dtype)
