"""Losses on the codes themselves."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels.reference._random_rows import choose_randomly, gather_rows


def orthogonal_loss(codes: Tensor, *, active: Tensor | None = None, max_codes: int | None = None) -> Tensor:
    """Mean squared cosine of all pairs of codes, less what equal pairs add (arXiv 2112.00384, equation 2).

    Args:
        codes: [C, K, D].
        active: bool [C, K], the codes that count; all by default.
        max_codes: count no more of them, drawn at random.
    """
    weight = None if active is None else active.to(codes.dtype).unsqueeze(-1)
    if max_codes is not None and codes.shape[1] > max_codes:
        if active is None:
            codes = codes[:, torch.randperm(codes.shape[1], device=codes.device)[:max_codes]]
        else:
            positions, usable = choose_randomly(active, max_codes)
            codes, weight = gather_rows(codes, positions), usable.to(codes.dtype).unsqueeze(-1)
    unit = F.normalize(codes, dim=-1, eps=1e-6)
    if weight is None:
        num_codes = torch.full((codes.shape[0],), codes.shape[1], dtype=codes.dtype, device=codes.device)
    else:
        unit, num_codes = unit * weight, weight.sum((1, 2)).clamp(min=1)
    # The squares of all K x K cosines add up to those of the D x D matrix of the other product.
    squares = (unit.mT @ unit).square().sum((1, 2))
    return (squares / num_codes.square() - 1 / num_codes).mean()


def mean_over(gradients: list[Tensor], group: Any) -> None:
    """Replaces gradients by their mean over the processes of a group; None: all."""
    for gradient in gradients:
        torch.distributed.all_reduce(gradient, group=group)
        gradient /= torch.distributed.get_world_size(group)
