"""SwiGLU in tensor operations."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor, *, bias: Tensor | None = None, gate: str = "first") -> Tensor:
    """See `vqkernels.swiglu`."""
    first, second = (x if bias is None else x + bias).chunk(2, -1)
    return F.silu(first) * second if gate == "first" else first * F.silu(second)
