"""GEGLU in tensor operations."""

import torch.nn.functional as F
from torch import Tensor


def geglu(x: Tensor, *, bias: Tensor | None = None, gate: str = "second", approximate: str = "none") -> Tensor:
    """See `vqkernels.geglu`."""
    first, second = (x if bias is None else x + bias).chunk(2, -1)
    if gate == "first":
        return F.gelu(first, approximate=approximate) * second
    return first * F.gelu(second, approximate=approximate)
