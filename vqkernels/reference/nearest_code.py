"""Nearest-codebook search with a matrix of all scores."""

from math import prod
from typing import Literal, overload

import torch
from torch import Tensor


@overload
def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str = ...,
    mask: Tensor | None = ...,
    return_score: Literal[False] = ...,
) -> Tensor: ...
@overload
def nearest_code(
    z: Tensor, codebook: Tensor, *, metric: str = ..., mask: Tensor | None = ..., return_score: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def nearest_code(
    z: Tensor, codebook: Tensor, *, metric: str = "l2", mask: Tensor | None = None, return_score: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """See `vqkernels.nearest_code`."""
    row_shape = z.shape[:-1]
    scores, chosen = all_scores(z, codebook, metric)
    indices = scores.argmax(-1)
    best = scores.gather(-1, indices.unsqueeze(-1)).squeeze(-1)
    chosen = chosen & (best > -torch.inf)
    if mask is not None:
        chosen &= mask.expand(row_shape).reshape(chosen.shape)
    indices = indices.masked_fill(~chosen, -1).reshape(row_shape)
    return (indices, best.masked_fill(~chosen, -torch.inf).reshape(row_shape)) if return_score else indices


def all_scores(z: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The scores [H, N, K] (-Inf: invalid code) of rows z [..., D], and which rows are valid [H, N]."""
    dtype = torch.float64 if torch.float64 in (z.dtype, codebook.dtype) else torch.float32
    largest = torch.finfo(dtype).max / 4
    heads = codebook.shape[0] if codebook.ndim == 3 else 1
    rows = prod(z.shape[:-1]) // heads
    z = z.detach().to(dtype).reshape(heads, rows, z.shape[-1])
    codes = codebook.detach().to(dtype).reshape(heads, -1, z.shape[-1])

    norm = codes.square().sum(-1, keepdim=True)
    valid_code = norm <= largest
    if metric == "cosine":
        codes = codes / torch.where(norm > 0, norm, 1).sqrt()
    bias = -norm / 2 if metric == "l2" else torch.zeros_like(norm)
    bias = bias.masked_fill(~valid_code, -torch.inf)
    valid_row = z.square().sum(-1) <= largest
    # Zeros stand in for what is invalid, so that no NaN reaches the scores.
    scores = torch.baddbmm(bias.mT, z.masked_fill(~valid_row.unsqueeze(-1), 0), codes.masked_fill(~valid_code, 0).mT)
    return scores, valid_row
