"""Code statistics with index_add."""

import torch
from torch import Tensor


def code_statistics(z: Tensor, indices: Tensor, num_codes: int, *, heads: bool = False) -> tuple[Tensor, Tensor]:
    """See `vqkernels.code_statistics`. Sums are float64 for float64 rows."""
    num_heads = z.shape[0] if heads else 1
    dim = z.shape[-1]
    # One more code takes in the rows that have none.
    codes = torch.where((indices < 0) | (indices >= num_codes), num_codes, indices).reshape(num_heads, -1)
    codes = (codes + (num_codes + 1) * torch.arange(num_heads, device=z.device).unsqueeze(-1)).flatten()
    counts = torch.zeros(num_heads * (num_codes + 1), dtype=torch.int64, device=z.device)
    counts.index_add_(0, codes, torch.ones_like(codes))
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    sums = torch.zeros(num_heads * (num_codes + 1), dim, dtype=dtype, device=z.device)
    sums.index_add_(0, codes, z.detach().to(dtype).reshape(-1, dim))
    counts = counts.reshape(num_heads, num_codes + 1)[:, :-1]
    sums = sums.reshape(num_heads, num_codes + 1, dim)[:, :-1]
    return (counts, sums) if heads else (counts[0], sums[0])
