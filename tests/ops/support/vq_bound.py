"""How far from the best a chosen code may be: the bound of vqkernels/triton/nearest_code.py, in extended precision."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """What inputs of these types are computed in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


class TrueScores(NamedTuple):
    """Of rows [N, D] and codes [K, D]. Extended precision stands in for exact arithmetic."""

    scores: np.ndarray  # [N, K]
    error: np.ndarray  # [N, K], how far off a computed score may be
    valid_row: np.ndarray  # [N]
    valid_code: np.ndarray  # [K]


def true_scores(z: Tensor, codebook: Tensor, metric: str) -> TrueScores:
    dtype = wide(z.dtype, codebook.dtype)
    roundings = (2 * z.shape[1] + 3) * UNIT_ROUNDOFF[dtype]
    gamma = roundings / (1 - roundings)
    limit = torch.finfo(dtype).max / 4
    rows, codes = (x.double().numpy().astype(np.longdouble) for x in (z, codebook))
    with np.errstate(all="ignore"):
        norm = (codes**2).sum(1)
        valid_row, valid_code = (rows**2).sum(1) <= limit, norm <= limit
    rows, codes = np.where(valid_row[:, None], rows, 0), np.where(valid_code[:, None], codes, 0)
    if metric == "cosine":
        codes = codes / np.sqrt(np.where((norm > 0) & valid_code, norm, 1))[:, None]
    bias = np.where(valid_code, norm / 2, 0) if metric == "l2" else np.zeros(len(codes))
    error = gamma * (abs(rows) @ abs(codes).T + bias)
    return TrueScores(rows @ codes.T - bias, error, valid_row, valid_code)


def assert_within_bound(z: Tensor, codebook: Tensor, metric: str, indices: Tensor, scores: Tensor | None) -> None:
    """Of one head; scores are checked where given."""
    true = true_scores(z, codebook, metric)
    chosen = indices.numpy() >= 0
    assert (chosen == (true.valid_row & true.valid_code.any())).all()
    assert scores is None or (scores[~chosen] == -torch.inf).all()
    if not chosen.any():
        return
    index = indices.numpy()[chosen]
    assert true.valid_code[index].all()
    true_score, error = true.scores[chosen], true.error[chosen]
    least = np.where(true.valid_code, true_score - error, -np.inf).max(1)
    row = np.arange(len(index))
    assert (true_score[row, index] >= least - error[row, index]).all()
    assert scores is None or (abs(scores.numpy()[chosen] - true_score[row, index]) <= error[row, index]).all()
