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
from vqkernels.triton.arithmetic import load_as, load_columns

BLOCK_ROWS = 64
BLOCK_CODES = 32
BLOCK_DIM = 16  # the least that tl.dot takes everywhere
_PROGRAMS = 1024  # enough to fill a GPU: with fewer blocks of rows, the codes are split too
_SPLIT_BLOCKS = 32  # but no split has fewer blocks of codes


class SearchInputs(NamedTuple):
    """Contiguous tensors of types that go together."""

    z: Tensor  # [H, N, D]
    codebook: Tensor  # [H, K, D]
    mask: Tensor | None  # [H, N]
    dtype: torch.dtype  # of scores: float32, or float64 where an input is


def search_inputs(z: Tensor, codebook: Tensor, mask: Tensor | None, name: str = "codebook") -> SearchInputs:
    """Checks what memory safety needs of a direct torch.ops call."""
    check_base("z", z, FLOAT_TYPES, "[H, N, D]")
    heads, rows, dim = z.shape
    check_like(name, codebook, FLOAT_TYPES, (heads, *codebook.shape[1:2], dim), "z", z)
    torch._check(codebook.shape[1] > 0, lambda: f"vqkernels: expected a {name} that is not empty")
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
        value = load_as(x + row * dim + d, inside, norm.dtype)
        norm = tl.fma(value, value, norm)
    tl.store(norms + row, norm, mask=inside)


def _squared_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D], contiguous -> [...]."""
    norms = x.new_empty(x.shape[:-1], dtype=dtype)
    with torch.cuda.device_of(x):
        _squared_norm_kernel[(triton.cdiv(norms.numel(), 128),)](x, norms, norms.numel(), x.shape[-1], BLOCK=128)
    return norms


def valid_rows(inputs: SearchInputs) -> Tensor:
    """Whether each row takes part: bool [H, N]."""
    valid = _squared_norm(inputs.z, inputs.dtype) <= torch.finfo(inputs.dtype).max / 4
    return valid if inputs.mask is None else valid & inputs.mask


def codes_to_compare(inputs: SearchInputs, metric: str) -> tuple[Tensor, Tensor]:
    """The codes as the metric takes them, [H, K, D], and their bias [H, K]: -Inf for an invalid code."""
    torch._check(metric in ("l2", "cosine", "dot"), lambda: f"vqkernels: unknown metric {metric}")
    codebook = inputs.codebook
    norm = _squared_norm(codebook, inputs.dtype)
    bias = norm / -2 if metric == "l2" else torch.zeros_like(norm)
    bias = bias.masked_fill(~(norm <= torch.finfo(inputs.dtype).max / 4), -torch.inf)
    if metric == "cosine":
        codebook = codebook / torch.where(norm > 0, norm, 1).sqrt().unsqueeze(-1)
    return codebook, bias


@triton.jit
def add_products(
    score: tl.tensor,  # [rows, codes]
    z_tile: tl.tensor,  # [rows, BLOCK_DIM], columns from `first` on, 0 from column dim on
    code_row: tl.tensor,  # [codes], pointers
    code_inside: tl.tensor,
    first: tl.int64,
    dim: tl.int64,
    BLOCK_DIM: tl.constexpr,
) -> tl.tensor:
    code_tile = load_columns(code_row, code_inside, first, dim, score.dtype, BLOCK_DIM)
    return tl.dot(z_tile, tl.trans(code_tile), score, input_precision="ieee")


@triton.jit
def first_scores(
    bias: tl.tensor, code: tl.tensor, codes: tl.int64, BLOCK_ROWS: tl.constexpr, BLOCK_CODES: tl.constexpr
) -> tl.tensor:
    """What the products are added to: the bias of each code [BLOCK_CODES], -Inf beyond the last.

    Whatever is added to the -Inf of an invalid code gives -Inf or NaN, and neither is larger than anything.
    """
    code_bias = tl.load(bias + code, mask=code < codes, other=float("-inf"))
    return tl.zeros((BLOCK_ROWS, BLOCK_CODES), code_bias.dtype) + code_bias[None, :]


@triton.jit
def score_codes(
    z_row: tl.tensor,  # [BLOCK_ROWS], pointers
    row_inside: tl.tensor,
    codebook: tl.tensor,  # [codes, dim]
    bias: tl.tensor,  # [codes]
    code: tl.tensor,  # [BLOCK_CODES]
    codes: tl.int64,
    dim: tl.int64,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> tl.tensor:
    """Scores of rows in memory: [BLOCK_ROWS, BLOCK_CODES]."""
    score = first_scores(bias, code, codes, BLOCK_ROWS, BLOCK_CODES)
    code_inside = code < codes
    code_row = codebook + code * dim
    if score.dtype == tl.float64:
        for d in range(dim):
            z_value = load_as(z_row + d, row_inside, score.dtype)
            score = tl.fma(z_value[:, None], load_as(code_row + d, code_inside, score.dtype)[None, :], score)
    else:
        for d in range(0, dim, BLOCK_DIM):
            z_tile = load_columns(z_row, row_inside, d, dim, score.dtype, BLOCK_DIM)
            score = add_products(score, z_tile, code_row, code_inside, d, dim, BLOCK_DIM)
    return score


@triton.jit
def keep_better(
    score: tl.tensor, block: tl.int64, best: tl.tensor, best_block: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Each lane keeps the best of its own codes, which come in ascending order, so that ">" keeps the lowest."""
    better = score > best
    return tl.where(better, score, best), tl.where(better, block, best_block).to(tl.int32)


@triton.jit
def best_of_lanes(
    best: tl.tensor, best_block: tl.tensor, codes: tl.int64, BLOCK_CODES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The best score of each row, and the lowest index that has it."""
    top = tl.max(best, axis=1)
    code = best_block.to(tl.int64) * BLOCK_CODES + tl.arange(0, BLOCK_CODES)[None, :]
    return top, tl.min(tl.where(best == top[:, None], code, codes), axis=1)


@triton.jit(do_not_specialize=["heads", "rows", "codes", "row_blocks", "split_blocks"])
def _search_kernel(
    z: tl.tensor,
    codebook: tl.tensor,
    bias: tl.tensor,  # [heads, codes]
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
    row += head * rows
    codebook += head * codes * dim
    bias += head * codes
    first_block = split * split_blocks
    last_block = tl.minimum(first_block + split_blocks, tl.cdiv(codes, BLOCK_CODES))

    best = tl.full((BLOCK_ROWS, BLOCK_CODES), float("-inf"), scores.dtype.element_ty)
    best_block = tl.zeros((BLOCK_ROWS, BLOCK_CODES), tl.int32)
    for block in range(first_block, last_block):
        code = block * BLOCK_CODES + tl.arange(0, BLOCK_CODES)
        score = score_codes(
            z + row * dim, row_inside, codebook, bias, code, codes, dim, BLOCK_ROWS, BLOCK_CODES, BLOCK_DIM
        )
        best, best_block = keep_better(score, block, best, best_block)

    top, index = best_of_lanes(best, best_block, codes, BLOCK_CODES)
    chosen = (tl.load(valid + row, mask=row_inside, other=0) != 0) & (top > float("-inf"))
    out = split * heads * rows + row
    tl.store(scores + out, tl.where(chosen, top, float("-inf")), mask=row_inside)
    tl.store(indices + out, tl.where(chosen, index, -1), mask=row_inside)


def search(inputs: SearchInputs, metric: str) -> tuple[Tensor, Tensor]:
    """Indices, int64 [H, N], and scores [H, N]."""
    z = inputs.z
    heads, rows, dim = z.shape
    codebook, bias = codes_to_compare(inputs, metric)
    codes = codebook.shape[1]
    row_blocks, code_blocks = triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(codes, BLOCK_CODES)
    splits = max(1, min(code_blocks // _SPLIT_BLOCKS, _PROGRAMS // max(1, heads * row_blocks)))
    scores = z.new_empty((splits, heads, rows), dtype=inputs.dtype)
    indices = z.new_empty((splits, heads, rows), dtype=torch.int64)
    with torch.cuda.device_of(z):
        _search_kernel[(splits * heads * row_blocks,)](
            z,
            codebook,
            bias,
            valid_rows(inputs),
            scores,
            indices,
            heads,
            rows,
            codes,
            dim,
            row_blocks,
            triton.cdiv(code_blocks, splits),
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_CODES=BLOCK_CODES,
            BLOCK_DIM=BLOCK_DIM,
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
