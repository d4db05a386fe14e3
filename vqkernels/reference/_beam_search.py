"""Beam search over the levels of a residual quantizer, on any implementation of `topk_codes`."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TopkCodes = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def beam_search(
    z: Tensor,
    codebooks: Sequence[Tensor],
    num_levels: Tensor | None,
    beam_size: int,
    weights: Sequence[float],
    topk_codes: TopkCodes,
) -> Tensor:
    """Codes of the rows that make the weighted sum of the squared errors after every level small.

    Keeps, per row, the B best beginnings; each is continued with its B best codes of the next
    level. Among equal errors the better beginning wins, then the better code. Memory is O(B N D).

    Args:
        z: [H, N, D], float32 or float64.
        codebooks: [H, K_q, D] a level, in the dtype of z.
        num_levels: int64 [H, N] or None; a row leaves the search after as many levels.
        beam_size: B, at least 1.
        weights: one a level.
        topk_codes: from rows [H, M, D], codes [H, K, D] and k to indices and scores [H, M, k].

    Returns:
        indices, int64 [H, N, Q]; -1 for levels that do not run or have no code.
    """
    heads, rows, dim = z.shape
    residual = z.unsqueeze(2)
    cost = z.new_zeros(heads, rows, 1)
    chosen = torch.empty(heads, rows, 1, 0, dtype=torch.int64, device=z.device)
    for level, (codes, weight) in enumerate(zip(codebooks, weights, strict=True)):
        width, k = residual.shape[2], min(beam_size, codes.shape[1])
        indices = topk_codes(residual.reshape(heads, rows * width, dim), codes, k)[0].reshape(heads, rows, width, k)
        runs = torch.ones_like(cost, dtype=torch.bool) if num_levels is None else (num_levels > level).unsqueeze(-1)
        indices = indices.masked_fill(~runs.unsqueeze(-1), -1)
        # One beam after the other, so that only N k differences of rows live at a time.
        errors = [_squared_norm(residual[:, :, i : i + 1] - _gather(codes, indices[:, :, i])) for i in range(width)]
        costs = cost.unsqueeze(-1) + weight * torch.stack(errors, 2)
        costs = costs.masked_fill(indices < 0, torch.inf)
        # A row that has left goes on as it is, in its first continuation.
        stays = torch.where(torch.arange(k, device=z.device) == 0, cost.unsqueeze(-1), torch.inf)
        costs = torch.where(runs.unsqueeze(-1), costs, stays)
        cost, order = costs.flatten(2).sort(dim=-1, stable=True)
        cost, order = cost[..., :beam_size], order[..., :beam_size]
        beam = order // k
        index = indices.flatten(2).gather(2, order)
        residual = residual.gather(2, beam.unsqueeze(-1).expand(*beam.shape, dim))
        residual = torch.where((index >= 0).unsqueeze(-1), residual - _gather(codes, index), residual)
        chosen = chosen.gather(2, beam.unsqueeze(-1).expand(*beam.shape, level))
        chosen = torch.cat([chosen, index.unsqueeze(-1)], -1)
    return chosen[:, :, 0]


def _gather(codes: Tensor, indices: Tensor) -> Tensor:
    """Codes [H, K, D] at indices [H, N, M]."""
    heads, num_codes, dim = codes.shape
    offsets = num_codes * torch.arange(heads, device=indices.device).reshape(heads, 1, 1)
    return F.embedding(indices.clamp(min=0) + offsets, codes.reshape(heads * num_codes, dim))


def _squared_norm(x: Tensor) -> Tensor:
    """Over the last dimension, in an order that depends on its size alone, unlike that of torch.sum."""
    x = x.square()
    while x.shape[-1] > 1:
        half = (x.shape[-1] + 1) // 2
        x = x[..., :half] + F.pad(x[..., half:], (0, 2 * half - x.shape[-1]))
    return x.squeeze(-1)
