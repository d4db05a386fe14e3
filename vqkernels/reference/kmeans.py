"""Codes from data: Lloyd's iterations from random rows."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqkernels.reference import _kmeans_sums
from vqkernels.reference._random_rows import draw_rows

if TYPE_CHECKING:
    from vqkernels.reference.codebook import Codebook


def kmeans(codebook: "Codebook", rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As many centres as a codebook has codes, found with its operations.

    Args:
        codebook: whose size, metric, iterations and synchronization are meant.
        rows: [C, M, D].
        mask: bool [C, M] or None; rows where it is False take no part.

    Returns:
        centres: float32 [C, K, D]; an empty cluster keeps its centre.
        counts: int64 [C, K].
        possible: bool [C, 1], whether there was a row to start from.
    """
    num_codes = codebook.codebook_size
    synchronizes = codebook.reproducible or (codebook.sync_codebook and codebook.sync_kmeans)
    valid = codebook.valid_rows(rows, mask)
    if synchronizes:
        means, possible = _kmeans_sums.draw_rows(codebook, rows, valid)
    else:
        means, possible = draw_rows(rows, valid, num_codes)
    counts = torch.zeros(means.shape[:2], dtype=torch.int64, device=rows.device)
    for _ in range(codebook.kmeans_iters):
        indices = codebook.nearest_code(rows, means, metric=codebook.metric, mask=mask)
        counts, sums = codebook.code_statistics(rows, indices, num_codes, heads=True)
        if synchronizes:
            counts, sums = _kmeans_sums.sum_statistics(codebook, rows, indices, counts, sums)
        centres = sums / counts.clamp(min=1).unsqueeze(-1)
        means = torch.where(counts.unsqueeze(-1) > 0, codebook.transform_input(centres), means).to(torch.float32)
    return means, counts, possible
