"""Affine parameters: codes take on the mean and the variance of the rows (arXiv 2305.08842, section 4).

The functions work on the buffers of a codebook: mean and variance of its codes, float32 [C, 1, D], and those of the
rows, which are None until there were any.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vqkernels.reference import synchronization
from vqkernels.reference._copies import own_copy

if TYPE_CHECKING:
    from vqkernels.reference.codebook import Codebook

LEAST_VARIANCE = 1e-5


@torch.no_grad()
def update_affine_(codebook: "Codebook", rows: Tensor, valid: Tensor) -> None:
    """Moves the averages to the mean and variance of the codes and of the valid rows [C, M, D]."""
    decay = codebook.affine_param_codebook_decay
    variance, mean = torch.var_mean(codebook.embed, dim=1, correction=0, keepdim=True)
    for name, value in (("mean", mean), ("variance", variance)):
        average = getattr(codebook, f"codebook_{name}")
        needs_init = getattr(codebook, f"codebook_{name}_needs_init")
        average.copy_(torch.where(needs_init, value, torch.lerp(value, average, decay)))
        needs_init.fill_(False)

    rows = torch.where(valid.unsqueeze(-1), rows, 0).to(torch.float32)
    num_rows = valid.sum(-1, dtype=torch.float32)[:, None, None]
    totals = _total(codebook, torch.cat([rows.sum(1, keepdim=True), num_rows], -1))
    total, num_rows = totals.split([rows.shape[-1], 1], -1)
    mean = total / num_rows.clamp(min=1)
    squares = torch.where(valid.unsqueeze(-1), rows - mean, 0).square()
    variance = _total(codebook, squares.sum(1, keepdim=True)) / num_rows.clamp(min=1)
    decay = codebook.affine_param_batch_decay
    if codebook.batch_mean is None or codebook.batch_variance is None:
        codebook.batch_mean = mean
        codebook.batch_variance = torch.where(num_rows > 0, variance, 1)
        return
    for average, value in ((codebook.batch_mean, mean), (codebook.batch_variance, variance)):
        average.copy_(torch.where(num_rows > 0, torch.lerp(value, average, decay), average))


def to_batch(codebook: "Codebook", embed: Tensor) -> Tensor:
    """Codes [C, K, D] as they meet the rows; as they are before the first training step."""
    if codebook.batch_mean is None:
        return embed
    codebook_std, batch_std = _deviations(codebook)
    keep = own_copy if codebook.training else lambda t: t  # averages move in training
    return keep((embed - codebook.codebook_mean) * keep(batch_std / codebook_std) + codebook.batch_mean)


def to_codebook(codebook: "Codebook", rows: Tensor) -> Tensor:
    """Rows [C, M, D] as the codes follow them."""
    if codebook.batch_mean is None:
        return rows
    codebook_std, batch_std = _deviations(codebook)
    return (rows - codebook.batch_mean) * (codebook_std / batch_std) + codebook.codebook_mean


def _deviations(codebook: "Codebook") -> tuple[Tensor, Tensor]:
    assert codebook.batch_variance is not None
    variances = (codebook.codebook_variance, codebook.batch_variance)
    codebook_std, batch_std = (variance.clamp(min=LEAST_VARIANCE).sqrt() for variance in variances)
    return codebook_std, batch_std


def _total(codebook: "Codebook", value: Tensor) -> Tensor:
    """The sum over all processes, where the codebook's rows are those of all."""
    if codebook.sync_affine_param and synchronization.is_distributed():
        torch.distributed.all_reduce(value, group=codebook.process_group)
    return value
