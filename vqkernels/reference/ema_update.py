"""The EMA update in tensor operations."""

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    code_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float,
) -> None:
    """See `vqkernels.ema_update_`."""
    cluster_size.lerp_(counts.to(cluster_size.dtype), 1 - decay)
    code_sum.lerp_(sums.to(code_sum.dtype), 1 - decay)
    n = cluster_size.sum(-1, keepdim=True)
    smoothed = (cluster_size + eps) / (n + codebook.shape[-2] * eps) * n
    smoothed = smoothed.unsqueeze(-1)
    codebook.copy_(torch.where(smoothed > 0, code_sum / smoothed, codebook))
