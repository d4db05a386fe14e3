"""Random choices that wait for no device."""

import torch
from torch import Tensor


def choose_randomly(candidates: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Draws distinct candidates of each row of a bool [C, M].

    Returns:
        positions, int64 [C, num], candidates first and in random order; and whether each is a candidate, bool [C, num].
    """
    return choose_by_keys(torch.rand(candidates.shape, device=candidates.device), candidates, num)


def choose_by_keys(keys: Tensor, candidates: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """`choose_randomly` by keys of at least 0, float [C, M]: the candidates with the largest ones."""
    keys, positions = keys.masked_fill(~candidates, -1).topk(num)
    return positions, keys >= 0


def gather_rows(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of x [C, M, D] at int64 [C, N], as [C, N, D]."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def draw_rows(rows: Tensor, valid: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Draws distinct valid rows; where there are fewer than asked for, they start over.

    Args:
        rows: [C, M, D].
        valid: bool [C, M].
        num: rows to draw for each C.

    Returns:
        drawn: float32 [C, num, D].
        possible: bool [C, 1], whether there was a valid row.
    """
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0], num, rows.shape[-1], dtype=torch.float32), valid.any(-1, keepdim=True)
    positions, _ = choose_randomly(valid, min(num, rows.shape[1]))
    num_valid = valid.sum(-1, keepdim=True)
    turns = torch.arange(num, device=rows.device) % num_valid.clamp(min=1)
    return gather_rows(rows, positions.gather(1, turns)).to(torch.float32), num_valid > 0
