"""Nearest-codebook search.

Scores s(z, c) are those of csrc/cpu/nearest_code.h up to rounding: the order of additions inside `tl.dot` is not
promised, and an older interpreter rounds products. What is chosen is bounded instead. Let u be the unit roundoff of
the compute type (2^-24 for float32, 2^-53 for float64), gamma_n = n u / (1 - n u), c the code, for "cosine" divided by
its norm, and let nothing underflow. Then

- a product z_d c_d is rounded once and passes at most D additions, in whatever order the D + 1 terms are added: D + 1
  roundings; for "cosine" c_d itself has up to D in |c|^2, of which the root leaves half, and one each in root and
  quotient;
- the bias |c|^2 / 2 ("l2" alone) has D roundings and passes D additions: 2 D.

So a computed score is off by at most

    E(z, c) = gamma_{2D+3} (sum_d |z_d c_d| + bias),   bias = |c|^2 / 2 for "l2", else 0,

and for the chosen code a and the best code b, s(z, a) >= s(z, b) - E(z, a) - E(z, b). For "l2", where the squared
distance is |z|^2 - 2 s, that of a exceeds that of b by at most 2 (E(z, a) + E(z, b)).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.reference._checks import FLOAT_TYPES
from vqkernels.triton._checks import check_base, check_like

_BLOCK_ROWS = 64
_BLOCK_CODES = 32
_BLOCK_DIM = 16  # the least that tl.dot takes everywhere
_PROGRAMS = 1024  # enough to fill a GPU: with fewer blocks of rows, the codes are split too
_SPLIT_BLOCKS = 32  # but no split has fewer blocks of codes


class SearchInputs(NamedTuple):
    """Contiguous tensors of types that go together."""

    z: Tensor  # [H, N, D]
    codebook: Tensor  # [H, K, D]
    mask: Tensor | None  # [H, N]
    dtype: torch.dtype  # of scores: float32, or float64 where an input is


def search_inputs(z: Tensor, codebook: Tensor, mask: Tensor | None) -> SearchInputs:
    """Checks what memory safety needs of a direct torch.ops call."""
    check_base("z", z, FLOAT_TYPES, "[H, N, D]")
    heads, rows, dim = z.shape
    check_like("codebook", codebook, FLOAT_TYPES, (heads, *codebook.shape[1:2], dim), "z", z)
    torch._check(codebook.shape[1] > 0, lambda: "vqkernels: expected a codebook that is not empty")
    if mask is not None:
        check_like("mask", mask, (torch.bool,), (heads, rows), "z", z)
        mask = mask.contiguous()
    wide = torch.float64 in (z.dtype, codebook.dtype)
    if wide:
        z, codebook = z.double(), codebook.double()
    return SearchInputs(z.contiguous(), codebook.contiguous(), mask, torch.float64 if wide else torch.float32)


@triton.jit(do_not_specialize=["rows"])
def _squared_norm_kernel(x: tl.tensor, norms: tl.tensor, rows: tl.int64, dim: tl.int64, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    norm = tl.zeros((BLOCK,), norms.dtype.element_ty)
    for d in range(dim):
        value = tl.load(x + row * dim + d, mask=inside, other=0.0).to(norm.dtype)
        norm = tl.fma(value, value, norm)
    tl.store(norms + row, norm, mask=inside)


def _squared_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D], contiguous -> [...]."""
    norms = x.new_empty(x.shape[:-1], dtype=dtype)
    with torch.cuda.device_of(x):
        _squared_norm_kernel[(triton.cdiv(norms.numel(), 128),)](x, norms, norms.numel(), x.shape[-1], BLOCK=128)
    return norms


@triton.jit(do_not_specialize=["heads", "rows", "codes", "row_blocks", "split_blocks"])
def _search_kernel(
    z: tl.tensor,
    codebook: tl.tensor,
    bias: tl.tensor,  # [heads, codes], -Inf: an invalid code
    valid: tl.tensor,  # [heads, rows]
    scores: tl.tensor,  # [splits, heads, rows]
    indices: tl.tensor,
    heads: tl.int64,
    rows: tl.int64,
    codes: tl.int64,
    dim: tl.int64,
    row_blocks: tl.int64,
    split_blocks: tl.int64,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    # Everything is along the first axis of the grid: the others end at 65,535.
    program = tl.program_id(0).to(tl.int64)
    row = program % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head = program // row_blocks % heads
    split = program // row_blocks // heads
    row_inside = row < rows
    z_row = z + (head * rows + row) * dim
    lane = tl.arange(0, BLOCK_CODES)
    first_block = split * split_blocks
    last_block = tl.minimum(first_block + split_blocks, tl.cdiv(codes, BLOCK_CODES))

    # Each lane keeps the best of its own codes, which come in ascending order, so that ">" keeps the lowest.
    best = tl.full((BLOCK_ROWS, BLOCK_CODES), float("-inf"), scores.dtype.element_ty)
    best_block = tl.zeros((BLOCK_ROWS, BLOCK_CODES), tl.int32)
    for block in range(first_block, last_block):
        code = block * BLOCK_CODES + lane
        code_inside = code < codes
        code_bias = tl.load(bias + head * codes + code, mask=code_inside, other=float("-inf"))
        code_row = codebook + (head * codes + code) * dim
        score = tl.zeros_like(best) + code_bias[None, :]
        if best.dtype == tl.float64:
            for d in range(dim):
                z_value = tl.load(z_row + d, mask=row_inside, other=0.0).to(best.dtype)
                code_value = tl.load(code_row + d, mask=code_inside, other=0.0).to(best.dtype)
                score = tl.fma(z_value[:, None], code_value[None, :], score)
        else:
            for d in range(0, dim, BLOCK_DIM):
                column = d + tl.arange(0, BLOCK_DIM)
                z_mask = row_inside[:, None] & (column < dim)[None, :]
                z_tile = tl.load(z_row[:, None] + column[None, :], mask=z_mask, other=0.0)
                code_mask = code_inside[None, :] & (column < dim)[:, None]
                code_tile = tl.load(code_row[None, :] + column[:, None], mask=code_mask, other=0.0)
                score = tl.dot(z_tile.to(best.dtype), code_tile.to(best.dtype), score, input_precision="ieee")
        # Whatever is added to the -Inf of an invalid code gives -Inf or NaN, and neither is larger than anything.
        better = score > best
        best = tl.where(better, score, best)
        best_block = tl.where(better, (block - first_block).to(tl.int32), best_block)

    top = tl.max(best, axis=1)
    code = (first_block + best_block) * BLOCK_CODES + lane[None, :]
    index = tl.min(tl.where(best == top[:, None], code, codes), axis=1)
    chosen = (tl.load(valid + head * rows + row, mask=row_inside, other=0) != 0) & (top > float("-inf"))
    out = (split * heads + head) * rows + row
    tl.store(scores + out, tl.where(chosen, top, float("-inf")), mask=row_inside)
    tl.store(indices + out, tl.where(chosen, index, -1), mask=row_inside)


def search(inputs: SearchInputs, metric: str) -> tuple[Tensor, Tensor]:
    """Indices, int64 [H, N], and scores [H, N]."""
    z, codebook, mask, dtype = inputs
    torch._check(metric in ("l2", "cosine", "dot"), lambda: f"vqkernels: unknown metric {metric}")
    heads, rows, dim = z.shape
    codes = codebook.shape[1]
    largest = torch.finfo(dtype).max / 4
    norm = _squared_norm(codebook, dtype)
    bias = norm / -2 if metric == "l2" else torch.zeros_like(norm)
    bias = bias.masked_fill(~(norm <= largest), -torch.inf)
    if metric == "cosine":
        codebook = codebook / torch.where(norm > 0, norm, 1).sqrt().unsqueeze(-1)
    valid = _squared_norm(z, dtype) <= largest
    if mask is not None:
        valid &= mask

    row_blocks, code_blocks = triton.cdiv(rows, _BLOCK_ROWS), triton.cdiv(codes, _BLOCK_CODES)
    splits = max(1, min(code_blocks // _SPLIT_BLOCKS, _PROGRAMS // max(1, heads * row_blocks)))
    scores = z.new_empty((splits, heads, rows), dtype=dtype)
    indices = z.new_empty((splits, heads, rows), dtype=torch.int64)
    with torch.cuda.device_of(z):
        _search_kernel[(splits * heads * row_blocks,)](
            z,
            codebook,
            bias,
            valid,
            scores,
            indices,
            heads,
            rows,
            codes,
            dim,
            row_blocks,
            triton.cdiv(code_blocks, splits),
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_CODES=_BLOCK_CODES,
            BLOCK_DIM=_BLOCK_DIM,
        )
    if splits == 1:
        return indices[0], scores[0]
    best = scores.amax(0)
    return torch.where(scores == best, indices, codes).amin(0), best


def nearest_code(z: Tensor, codebook: Tensor, metric: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices, int64 [H, N], and scores, float32 (float64 for float64) [H, N], of z [H, N, D] and codebook [H, K, D].

    Codes within the bound of this file from the best, among equal computed scores the lowest index; -1 and -Inf where
    the row is masked or invalid, or no code is valid (see `vqkernels.nearest_code`).
    """
    return search(search_inputs(z, codebook, mask), metric)
