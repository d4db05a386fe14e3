"""Group normalisation and SiLU in tensor operations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels.reference._memory_formats import dense_like


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: str = "silu",
) -> Tensor:
    """See `vqkernels.group_norm_silu`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    normed = torch.group_norm(x.to(wide), num_groups, weight, bias, eps)
    y = (F.silu(normed) if activation == "silu" else normed).to(x.dtype)
    result = dense_like(x)
    return y if y.stride() == result.stride() else result.copy_(y)
