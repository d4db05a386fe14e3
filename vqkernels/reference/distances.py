"""What needs the distances of rows to all codes: sampling, cross entropy, diversity of use, soft codes.

Rows are [C, M, D] without NaN or Inf, codes [C, K, D], or [C, M, K, D] where every row has codes of its own. Scores are
those of vector-quantize-pytorch: minus the distance, or the inner product where the cosine decides. They exist for a
block of rows at a time; where a gradient is to pass, blocks are computed again in the backward pass.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 2**24  # scores at a time


def code_scores(rows: Tensor, codes: Tensor, cosine: bool) -> Tensor:
    """Scores [C, M, K], -Inf for codes with NaN or Inf."""
    valid = codes.isfinite().all(-1)
    codes = codes.masked_fill(~valid.unsqueeze(-1), 0)
    if codes.ndim == 4:
        if cosine:
            scores = (codes @ rows.unsqueeze(-1)).squeeze(-1)
        else:
            scores = -F.pairwise_distance(rows.unsqueeze(-2), codes)
    else:
        valid = valid.unsqueeze(1)
        scores = rows @ codes.mT
        if not cosine:
            squares = rows.square().sum(-1, keepdim=True) + codes.square().sum(-1).unsqueeze(1)
            scores = -(squares - 2 * scores).clamp(min=1e-8).sqrt()
    return scores.masked_fill(~valid, -torch.inf)


@torch.no_grad()
def choose_codes(
    rows: Tensor, codes: Tensor, *, cosine: bool, temperature: float | None = None, topk: int | None = None
) -> Tensor:
    """The codes of the largest scores, int64 [C, M], or [C, M, topk] in descending order; -1 where no code is finite.

    With a temperature they are drawn from softmax(scores / temperature), without replacement.
    """
    per_head = []
    for head in range(rows.shape[0]):
        blocks = []
        for block in _blocks(rows.shape[1], codes.shape[-2]):
            scores = code_scores(rows[head, None, block], _codes_of(codes[head, None], block), cosine)
            if temperature is not None:
                # Gumbel noise, as vector-quantize-pytorch draws it.
                noise = torch.rand_like(scores).clamp(min=1e-20).log().neg()
                scores = scores / temperature - noise.clamp(min=1e-20).log()
            best, indices = scores.max(-1) if topk is None else scores.topk(topk)
            blocks.append(indices.masked_fill(best == -torch.inf, -1))
        per_head.append(torch.cat(blocks, 1))
    return torch.cat(per_head)


def cross_entropy(rows: Tensor, codes: Tensor, targets: Tensor, *, cosine: bool) -> Tensor:
    """Mean cross entropy of the softmax of scores and the targets, int64 [C, M]; rows with a negative target count not.

    A target that is no code makes it NaN.
    """

    def total(rows: Tensor, codes: Tensor, targets: Tensor) -> Tensor:
        scores = code_scores(rows, codes, cosine)
        num_codes = scores.shape[-1]
        own = scores.gather(-1, targets.clamp(0, num_codes - 1).unsqueeze(-1)).squeeze(-1)
        entropy = (scores.logsumexp(-1) - own).masked_fill(targets >= num_codes, torch.nan)
        return torch.where(targets < 0, 0, entropy).sum()

    blocks = _blocks(rows.shape[1], rows.shape[0] * codes.shape[-2])
    totals = [
        _run_block(total, len(blocks), rows[:, block], _codes_of(codes, block), targets[:, block]) for block in blocks
    ]
    return torch.stack(totals).sum() / (targets >= 0).sum().clamp(min=1)


def soft_codes(rows: Tensor, codes: Tensor, *, cosine: bool, temperature: float) -> Tensor:
    """Codes averaged by softmax(scores / temperature), [C, M, D]; gradients pass the softmax alone."""

    def average(rows: Tensor, codes: Tensor, fixed: Tensor) -> Tensor:
        share = (code_scores(rows, codes, cosine) / temperature).softmax(-1)
        return share @ fixed if fixed.ndim == 3 else (share.unsqueeze(-2) @ fixed).squeeze(-2)

    fixed = codes.detach()
    blocks = _blocks(rows.shape[1], rows.shape[0] * codes.shape[-2])
    averages = [
        _run_block(average, len(blocks), rows[:, block], _codes_of(codes, block), _codes_of(fixed, block))
        for block in blocks
    ]
    return torch.cat(averages, 1)


def negative_entropy(
    rows: Tensor, codes: Tensor, valid: Tensor, positions: Tensor, *, cosine: bool, temperature: float
) -> Tensor:
    """How little codes are mixed: minus the mean over positions of the entropy of their average softmax.

    Args:
        rows: [C, M, D].
        codes: [C, K, D] or [C, M, K, D].
        valid: bool [C, M], rows that count. A position without any counts not.
        positions: int64 [P, G], rows that belong to one position.
        cosine: see `code_scores`.
        temperature: what scores are multiplied by.
    """
    codebooks, num_codes = rows.shape[0], codes.shape[-2]
    # Where the rows of a single position are too many for a block, they come in parts of `width`.
    width = min(max(BLOCK // (codebooks * num_codes), 1), max(positions.shape[1], 1))

    def entropy(positions: Tensor) -> Tensor:
        """Sum of the entropies of some positions."""

        def mass(part: Tensor) -> Tensor:
            """Sum of the softmax of their rows, [P, K]."""
            flat = part.flatten()
            share = (code_scores(rows[:, flat], _codes_of(codes, flat), cosine) * temperature).softmax(-1)
            share = share.masked_fill(~valid[:, flat].unsqueeze(-1), 0)
            return share.reshape(codebooks, *part.shape, num_codes).sum((0, 2))

        parts = positions.split(width, 1)
        masses = torch.stack([_run_block(mass, len(parts), part) for part in parts])
        average = masses.sum(0) / valid[:, positions].sum((0, 2)).clamp(min=1).unsqueeze(-1)
        return -(average * average.clamp(min=1e-5).log()).sum()

    blocks = _blocks(positions.shape[0], codebooks * positions.shape[1] * num_codes)
    entropies = [_run_block(entropy, len(blocks), positions[block]) for block in blocks]
    return -torch.stack(entropies).sum() / valid[:, positions].any(2).any(0).sum().clamp(min=1)


def _blocks(num_rows: int, scores_of_row: int) -> list[slice]:
    size = max(BLOCK // max(scores_of_row, 1), 1)
    return [slice(start, start + size) for start in range(0, max(num_rows, 1), size)]


def _codes_of(codes: Tensor, rows: slice | Tensor) -> Tensor:
    return codes if codes.ndim == 3 else codes[:, rows]


def _run_block(function: Callable[..., Tensor], num_blocks: int, *tensors: Tensor) -> Tensor:
    """Calls the function; what its backward pass needs is computed again, unless it is the only block."""
    if num_blocks == 1 or not torch.is_grad_enabled():
        return function(*tensors)
    result = checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result
