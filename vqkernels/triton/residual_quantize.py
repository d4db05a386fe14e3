"""Residual quantization: every level searched as `nearest_code` searches what the levels before it left over.

A program takes a block of rows through all levels. Residuals of up to 128 columns stay in its registers, longer ones in
a work tensor that nobody else touches. What is summed up, and in which order, is as in `vector_quantize`; the error of
a row at a level is the squared norm of its next residual, which decides whether that residual is still valid.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.reference._checks import FLOAT_TYPES
from vqkernels.triton._checks import check_like
from vqkernels.triton.arithmetic import column_sum, load_code, load_columns, pairwise_sum, store_columns
from vqkernels.triton.code_statistics import code_statistics
from vqkernels.triton.nearest_code import (
    BLOCK_CODES,
    BLOCK_DIM,
    BLOCK_ROWS,
    SearchInputs,
    add_products,
    best_of_lanes,
    codes_to_compare,
    first_scores,
    keep_better,
    score_codes,
    search_inputs,
    valid_rows,
)
from vqkernels.triton.vector_quantize import check_gradient, rotate_back, rotation

_MAX_CHUNKS = 8  # of BLOCK_DIM columns in registers
_BACKWARD_ROWS = 32


@triton.jit(do_not_specialize=["rows", "codes", "levels", "row_blocks"])
def _residual_quantize_kernel(
    z: tl.tensor,  # [heads, rows, dim]
    codebooks: tl.tensor,  # [heads, codes, dim], one level after the other
    compared: tl.tensor,  # the same as the metric takes them; None where codes are given
    bias: tl.tensor,  # [heads, codes] or None
    first_codes: tl.tensor,  # [levels + 1]
    valid: tl.tensor,  # [heads, rows] or None
    num_levels: tl.tensor,  # [heads, rows] or None: all
    given: tl.tensor,  # [heads, rows, levels] or None: to be searched
    residual: tl.tensor,  # [heads, rows, dim], at first z; None: in registers
    quantized: tl.tensor,  # [heads, rows, dim]
    indices: tl.tensor,  # [heads, rows, levels]
    errors: tl.tensor,  # [heads, levels, rows]
    rows: tl.int64,
    codes: tl.int64,
    levels: tl.int64,
    dim: tl.int64,
    row_blocks: tl.int64,
    LARGEST: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    head = program // row_blocks
    row = program % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = row < rows
    error_row = errors + head * levels * rows + row
    row += head * rows
    place = row * dim
    codebooks += head * codes * dim
    dtype: tl.constexpr = errors.dtype.element_ty

    depth = tl.zeros((BLOCK_ROWS,), tl.int64) + levels
    if num_levels is not None:
        depth = tl.minimum(depth, tl.load(num_levels + row, mask=row_inside, other=0))
    has_code = row_inside
    if valid is not None:
        has_code = tl.load(valid + row, mask=row_inside, other=0) != 0
    done = tl.zeros((BLOCK_ROWS,), tl.int64)
    chunks: tl.tuple = ()
    for i in tl.static_range(CHUNKS):
        chunk = load_columns(z + place, row_inside, i * BLOCK_DIM, dim, dtype, BLOCK_DIM)
        chunks = chunks + (chunk,)  # noqa: RUF005

    for level in range(levels):
        first = tl.load(first_codes + level)
        size = tl.load(first_codes + level + 1) - first
        runs = has_code & (level < depth)
        if given is not None:
            has_code, index = load_code(given + row * levels + level, row_inside, size)
            has_code = has_code & runs
        else:
            best = tl.full((BLOCK_ROWS, BLOCK_CODES), float("-inf"), dtype)
            best_block = tl.zeros((BLOCK_ROWS, BLOCK_CODES), tl.int32)
            level_codes = compared + (head * codes + first) * dim
            level_bias = bias + head * codes + first
            # Where the level runs for no row of the block, no code is looked at.
            for block in range(tl.cdiv(size, BLOCK_CODES) * tl.max(runs.to(tl.int64), axis=0)):
                code = block * BLOCK_CODES + tl.arange(0, BLOCK_CODES)
                if CHUNKS == 0:
                    score = score_codes(
                        *(residual + place, row_inside, level_codes, level_bias, code, size, dim),
                        *(BLOCK_ROWS, BLOCK_CODES, BLOCK_DIM),
                    )
                else:
                    score = first_scores(level_bias, code, size, BLOCK_ROWS, BLOCK_CODES)
                    for i in tl.static_range(CHUNKS):
                        code_row = level_codes + code * dim
                        score = add_products(score, chunks[i], code_row, code < size, i * BLOCK_DIM, dim, BLOCK_DIM)
                best, best_block = keep_better(score, block, best, best_block)
            top, index = best_of_lanes(best, best_block, size, BLOCK_CODES)
            has_code = runs & (top > float("-inf"))
        tl.store(indices + row * levels + level, tl.where(has_code, index, -1), mask=row_inside)

        code_row = codebooks + (first + tl.where(has_code, index, 0)) * dim
        error_lanes = tl.zeros((BLOCK_ROWS, BLOCK_DIM), dtype)
        if CHUNKS == 0:
            tl.debug_barrier()  # the residuals have been read
            for d in range(0, dim, BLOCK_DIM):
                rest = load_columns(residual + place, has_code, d, dim, dtype, BLOCK_DIM)
                rest -= load_columns(code_row, has_code, d, dim, dtype, BLOCK_DIM)
                error_lanes = tl.fma(rest, rest, error_lanes)
                store_columns(residual + place, has_code, d, dim, rest, BLOCK_DIM)
            tl.debug_barrier()
        else:
            rests: tl.tuple = ()
            for i in tl.static_range(CHUNKS):
                rest = chunks[i] - load_columns(code_row, has_code, i * BLOCK_DIM, dim, dtype, BLOCK_DIM)
                error_lanes = tl.fma(rest, rest, error_lanes)
                rests = rests + (rest,)  # noqa: RUF005
            chunks = rests
        error = tl.where(has_code, pairwise_sum(error_lanes, BLOCK_ROWS, 4), 0.0)
        tl.store(error_row + level * rows, error, mask=row_inside)
        done += has_code.to(tl.int64)
        if given is None:
            has_code = has_code & (error <= LARGEST)

    tl.debug_barrier()  # the indices have been written
    lacks_code = (done < depth)[:, None]
    for d in range(0, dim, BLOCK_DIM):
        total = tl.zeros((BLOCK_ROWS, BLOCK_DIM), dtype)
        for level in range(levels):
            is_code, index = load_code(indices + row * levels + level, row_inside, codes)
            code_row = codebooks + (tl.load(first_codes + level) + index) * dim
            value = load_columns(code_row, is_code, d, dim, dtype, BLOCK_DIM)
            # The first code as it is, also a negative zero.
            total = tl.where(is_code[:, None], tl.where(level == 0, value, total + value), total)
        total = tl.where(lacks_code, float("nan"), total)
        store_columns(quantized + place, row_inside, d, dim, total, BLOCK_DIM)


@triton.jit(do_not_specialize=["heads", "rows", "codes", "levels"])
def _residual_backward_kernel(
    grad_quantized: tl.tensor,  # [heads, rows, dim] or None: zero
    residual: tl.tensor,  # [heads, rows, dim], at first z
    codebooks: tl.tensor,  # [heads, codes, dim]
    first_codes: tl.tensor,  # [levels + 1]
    indices: tl.tensor,  # [heads, rows, levels]
    coefficients: tl.tensor,  # [heads, levels], of (residual - code) in the gradient
    grad_z: tl.tensor,  # [heads, rows, dim]
    heads: tl.int64,
    rows: tl.int64,
    codes: tl.int64,
    levels: tl.int64,
    dim: tl.int64,
    ROTATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = row < heads * rows
    head = row // rows
    place = row * dim
    dtype: tl.constexpr = grad_z.dtype.element_ty
    for level in range(levels):
        first = tl.load(first_codes + level)
        size = tl.load(first_codes + level + 1) - first
        has_code, index = load_code(indices + row * levels + level, row_inside, size)
        code_row = codebooks + (head * codes + first + index) * dim
        factor = tl.load(coefficients + head * levels + level, mask=row_inside, other=0.0)[:, None]
        if ROTATE:
            turn = rotation(residual + place, code_row, grad_quantized + place, has_code, dim, dtype, BLOCK_ROWS)
            tl.debug_barrier()  # the residuals have been read
        for d in range(0, dim, 16):
            e = load_columns(residual + place, has_code, d, dim, dtype, 16)
            c = load_columns(code_row, has_code, d, dim, dtype, 16)
            gradient = factor * (e - c)
            if grad_quantized is not None:
                g = load_columns(grad_quantized + place, has_code, d, dim, dtype, 16)
                if ROTATE:
                    g = rotate_back(g, e, c, turn)
                gradient += g
            before = load_columns(grad_z + place, row_inside & (level > 0), d, dim, dtype, 16)
            total = tl.where(has_code[:, None], tl.where(level == 0, gradient, before + gradient), before)
            store_columns(grad_z + place, row_inside, d, dim, total, 16)
            store_columns(residual + place, has_code, d, dim, e - c, 16)
        tl.debug_barrier()


def _residual_inputs(z: Tensor, codebooks: Tensor, sizes: list[int], mask: Tensor | None) -> SearchInputs:
    """Checks what memory safety needs of a direct torch.ops call; the codebook has the codes of all levels."""
    inputs = search_inputs(z, codebooks, mask, "codebooks")
    torch._check(
        len(sizes) > 0 and min(sizes) > 0, lambda: f"vqkernels: expected sizes of at least 1, got {list(sizes)}"
    )
    check_like("codebooks", codebooks, FLOAT_TYPES, (z.shape[0], sum(sizes), z.shape[2]), "z and sizes", z)
    return inputs


def _first_codes(sizes: list[int], device: torch.device) -> Tensor:
    """Where each level begins, and the last ends; made on the device, which a copy from the host would wait for."""
    if len(set(sizes)) == 1:
        return torch.arange(0, sum(sizes) + 1, sizes[0], device=device)
    return torch.cat([torch.full((1,), sum(sizes[:level]), device=device) for level in range(len(sizes) + 1)])


def residual_quantize(
    z: Tensor,
    codebooks: Tensor,
    sizes: list[int],
    metric: str,
    mask: Tensor | None,
    num_levels: Tensor | None,
    indices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes z [H, N, D] with codebooks [H, K, D], of which level q has the next sizes[q] codes.

    Level q of a row runs where mask [H, N] holds and q < num_levels, int64 [H, N], until a row lacks a code. indices,
    int64 [H, N, Q], are codes chosen elsewhere: the search is left out.

    Returns quantized [H, N, D] in z's dtype, indices int64 [H, N, Q], mse, float32 (float64 for float64) [H, Q] over
    the rows that have a code, and the number of these rows, int64 [H, Q].
    """
    inputs = _residual_inputs(z, codebooks, sizes, mask)
    heads, rows, dim = z.shape
    levels = len(sizes)
    if num_levels is not None:
        check_like("num_levels", num_levels, (torch.int64,), (heads, rows), "z", z)
    if inputs.mask is not None:
        num_levels = torch.where(inputs.mask, levels if num_levels is None else num_levels, 0)
    compared = bias = valid = None
    if indices is None:
        compared, bias = codes_to_compare(inputs, metric)
        valid = valid_rows(inputs)
    else:
        check_like("indices", indices, (torch.int64,), (heads, rows, levels), "z and sizes", z)
        indices = indices.contiguous()

    chunks = triton.cdiv(dim, BLOCK_DIM)
    in_registers = chunks <= _MAX_CHUNKS and inputs.dtype == torch.float32
    quantized = torch.empty_like(inputs.z)
    found = z.new_empty((heads, rows, levels), dtype=torch.int64)
    errors = z.new_empty((heads, levels, rows), dtype=inputs.dtype)
    row_blocks = triton.cdiv(rows, BLOCK_ROWS)
    with torch.cuda.device_of(z):
        _residual_quantize_kernel[(heads * row_blocks,)](
            inputs.z,
            inputs.codebook,
            compared,
            bias,
            _first_codes(sizes, z.device),
            valid,
            None if num_levels is None else num_levels.contiguous(),
            indices,
            None if in_registers else inputs.z.to(inputs.dtype, copy=True),
            quantized,
            found,
            errors,
            rows,
            inputs.codebook.shape[1],
            levels,
            dim,
            row_blocks,
            LARGEST=torch.finfo(inputs.dtype).max / 4,
            CHUNKS=chunks if in_registers else 0,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_CODES=BLOCK_CODES,
            BLOCK_DIM=BLOCK_DIM,
        )
    valid_per_level = (found >= 0).sum(1)
    total = column_sum(errors.flatten(0, 1)).reshape(heads, levels)
    mse = total / (valid_per_level * dim).clamp(min=1)
    return quantized.to(z.dtype), found, mse.to(inputs.dtype), valid_per_level


def residual_quantize_backward(
    grad_quantized: Tensor | None,
    grad_mse: Tensor | None,
    z: Tensor,
    codebooks: Tensor,
    sizes: list[int],
    indices: Tensor,
    valid_rows: Tensor,
    gradient: str,
) -> Tensor:
    """The gradient of z [H, N, D], in z's dtype, from those of quantized [H, N, D] and mse [H, Q] (None: zero).

    Every level adds what `vector_quantize_backward` gives for its residuals.
    """
    inputs = _residual_inputs(z, codebooks, sizes, None)
    heads, rows, dim = z.shape
    levels = len(sizes)
    check_gradient(gradient)
    check_like("indices", indices, (torch.int64,), (heads, rows, levels), "z and sizes", z)
    check_like("valid_rows", valid_rows, (torch.int64,), (heads, levels), "z and sizes", z)
    if grad_quantized is not None:
        check_like("grad_quantized", grad_quantized, FLOAT_TYPES, z.shape, "z", z)
        grad_quantized = None if gradient == "none" else grad_quantized.to(inputs.z.dtype).contiguous()
    if grad_mse is None:
        coefficients = z.new_zeros((heads, levels), dtype=inputs.dtype)
    else:
        check_like("grad_mse", grad_mse, (inputs.dtype,), (heads, levels), "z and sizes", z)
        coefficients = (grad_mse.double() * 2 / (valid_rows * dim).clamp(min=1)).to(inputs.dtype).contiguous()
    grad_z = torch.empty_like(inputs.z, dtype=inputs.dtype)
    with torch.cuda.device_of(z):
        _residual_backward_kernel[(triton.cdiv(heads * rows, _BACKWARD_ROWS),)](
            grad_quantized,
            inputs.z.to(inputs.dtype, copy=True),
            inputs.codebook,
            _first_codes(sizes, z.device),
            indices.contiguous(),
            coefficients,
            grad_z,
            heads,
            rows,
            inputs.codebook.shape[1],
            levels,
            dim,
            ROTATE=gradient == "rotation" and grad_quantized is not None,
            BLOCK_ROWS=_BACKWARD_ROWS,
            enable_fp_fusion=False,  # terms are rounded before they are added up
        )
    return grad_z.to(z.dtype)


def residual_statistics(z: Tensor, codebooks: Tensor, sizes: list[int], indices: Tensor) -> tuple[Tensor, Tensor]:
    """Counts, int64 [H, K], and sums, float32 (float64 for float64) [H, K, D]: per level `code_statistics` of the
    residuals of z [H, N, D] with indices [H, N, Q].
    """
    inputs = _residual_inputs(z, codebooks, sizes, None)
    heads, rows, dim = z.shape
    check_like("indices", indices, (torch.int64,), (heads, rows, len(sizes)), "z and sizes", z)
    residual = inputs.z.to(inputs.dtype, copy=True)
    first_codes = torch.arange(heads, device=z.device).unsqueeze(-1)
    counts, sums = [], []
    for codes, index in zip(inputs.codebook.split(list(sizes), 1), indices.unbind(-1), strict=True):
        size = codes.shape[1]
        level_counts, level_sums = code_statistics(residual, index, size)
        counts.append(level_counts)
        sums.append(level_sums)
        is_code = (index >= 0) & (index < size)
        chosen = codes.reshape(heads * size, dim)[torch.where(is_code, index, 0) + size * first_codes]
        residual -= chosen.masked_fill_(~is_code.unsqueeze(-1), 0)
    return torch.cat(counts, 1), torch.cat(sums, 1)
