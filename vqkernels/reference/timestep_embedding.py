"""Sinusoidal embedding of timesteps in tensor operations."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def timestep_embedding(
    t: Tensor,
    dim: int,
    *,
    max_period: float = 10000.0,
    order: str = "cos_sin",
    shift: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `vqkernels.timestep_embedding`."""
    wide = torch.float64 if t.dtype == torch.float64 else torch.float32
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=wide, device=t.device)
    angle = scale * (t.to(wide).unsqueeze(-1) * (exponent / (half - shift)).exp())
    parts = (angle.cos(), angle.sin()) if order == "cos_sin" else (angle.sin(), angle.cos())
    return F.pad(torch.cat(parts, -1), (0, dim % 2)).to(wide if dtype is None else dtype)
