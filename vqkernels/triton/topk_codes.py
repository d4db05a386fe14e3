"""The k best codes of every row: scores, and the bound of their error, are those of `nearest_code`.

A program takes a block of rows through the codes and keeps the best few it has met of each. For more than that it goes
through the codes again, and passes over what it has put out. Nothing depends on k but the number of these rounds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.triton.nearest_code import (
    BLOCK_CODES,
    BLOCK_DIM,
    BLOCK_ROWS,
    codes_to_compare,
    score_codes,
    search_inputs,
    valid_rows,
)

_KEPT = 16


@triton.jit(do_not_specialize=["rows", "codes", "k", "row_blocks"])
def _topk_kernel(
    z: tl.tensor,  # [heads, rows, dim]
    codebook: tl.tensor,  # [heads, codes, dim]
    bias: tl.tensor,  # [heads, codes]
    valid: tl.tensor,  # [heads, rows]
    scores: tl.tensor,  # [heads, rows, k]
    indices: tl.tensor,
    rows: tl.int64,
    codes: tl.int64,
    k: tl.int64,
    dim: tl.int64,
    row_blocks: tl.int64,
    KEPT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    head = program // row_blocks
    row = program % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = row < rows
    row += head * rows
    codebook += head * codes * dim
    bias += head * codes
    is_valid = tl.load(valid + row, mask=row_inside, other=0) != 0
    dtype: tl.constexpr = scores.dtype.element_ty

    # What was put out last: a code comes after it if its score is less, or equal and its index larger.
    last = tl.full((BLOCK_ROWS,), float("inf"), dtype)
    last_index = tl.full((BLOCK_ROWS,), -1, tl.int64)
    for first in range(0, k, KEPT):
        # Free places are worth -Inf, which no code is, and are told apart by their indices.
        kept = tl.full((BLOCK_ROWS, KEPT), float("-inf"), dtype)
        kept_index = tl.zeros((BLOCK_ROWS, KEPT), tl.int64) + (codes + tl.arange(0, KEPT))[None, :]
        for block in range(tl.cdiv(codes, BLOCK_CODES)):
            code = (block * BLOCK_CODES + tl.arange(0, BLOCK_CODES)).to(tl.int64)
            score = score_codes(
                *(z + row * dim, row_inside, codebook, bias, code, codes, dim, BLOCK_ROWS, BLOCK_CODES, BLOCK_DIM)
            )
            comes_after = (score < last[:, None]) | ((score == last[:, None]) & (code[None, :] > last_index[:, None]))
            score = tl.where(comes_after & is_valid[:, None], score, float("-inf"))
            # The best code of the block takes the place of the worst that is kept, as long as it is better. Of equal
            # ones the lower index is better, and that of a later block is higher.
            top = tl.max(score, axis=1)
            worst = tl.min(kept, axis=1)
            while tl.max((top > worst).to(tl.int32), axis=0) > 0:
                index = tl.min(tl.where(score == top[:, None], code[None, :], codes), axis=1)
                worst_index = tl.max(tl.where(kept == worst[:, None], kept_index, -1), axis=1)
                replaced = (kept_index == worst_index[:, None]) & (top > worst)[:, None]
                kept = tl.where(replaced, top[:, None], kept)
                kept_index = tl.where(replaced, index[:, None], kept_index)
                score = tl.where(code[None, :] == index[:, None], float("-inf"), score)
                top = tl.max(score, axis=1)
                worst = tl.min(kept, axis=1)
        for place in range(first, tl.minimum(first + KEPT, k)):
            last = tl.max(kept, axis=1)
            last_index = tl.min(tl.where(kept == last[:, None], kept_index, codes + KEPT), axis=1)
            found = last > float("-inf")
            tl.store(scores + row * k + place, last, mask=row_inside)
            tl.store(indices + row * k + place, tl.where(found, last_index, -1), mask=row_inside)
            kept = tl.where(kept_index == last_index[:, None], float("-inf"), kept)


def topk_codes(z: Tensor, codebook: Tensor, k: int, metric: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices, int64 [H, N, k], and scores, float32 (float64 for float64), of z [H, N, D] and codebook [H, K, D].

    The k largest computed scores in descending order, among equal ones the lower index first; -1 and -Inf where there
    are fewer valid codes, or the row is masked or invalid.
    """
    inputs = search_inputs(z, codebook, mask)
    torch._check(k > 0, lambda: f"vqkernels: expected k of at least 1, got {k}")
    compared, bias = codes_to_compare(inputs, metric)
    heads, rows, dim = z.shape
    scores = z.new_empty((heads, rows, k), dtype=inputs.dtype)
    indices = z.new_empty((heads, rows, k), dtype=torch.int64)
    row_blocks = triton.cdiv(rows, BLOCK_ROWS)
    with torch.cuda.device_of(z):
        _topk_kernel[(heads * row_blocks,)](
            inputs.z,
            compared,
            bias,
            valid_rows(inputs),
            scores,
            indices,
            rows,
            compared.shape[1],
            k,
            dim,
            row_blocks,
            KEPT=_KEPT,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_CODES=BLOCK_CODES,
            BLOCK_DIM=BLOCK_DIM,
        )
    return indices, scores
