"""Bias and GELU in tensor operations."""

import torch.nn.functional as F
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    """See `vqkernels.bias_gelu`."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate)
