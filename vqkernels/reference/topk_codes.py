"""The k best codes with a matrix of all scores."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels.reference.nearest_code import all_scores


def topk_codes(
    z: Tensor, codebook: Tensor, k: int, *, metric: str = "l2", mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `vqkernels.topk_codes`."""
    scores, valid_row = all_scores(z, codebook, metric)
    heads, rows, codes = scores.shape
    if mask is not None:
        valid_row = valid_row & mask.expand(z.shape[:-1]).reshape(heads, rows)
    best, indices = scores.masked_fill(~valid_row.unsqueeze(-1), -torch.inf).sort(dim=-1, descending=True, stable=True)
    best = F.pad(best[..., :k], (0, max(k - codes, 0)), value=-torch.inf)
    indices = F.pad(indices[..., :k], (0, max(k - codes, 0))).masked_fill(best == -torch.inf, -1)
    return indices.reshape(*z.shape[:-1], k), best.reshape(*z.shape[:-1], k)
