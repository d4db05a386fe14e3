"""Codes that depend on what was quantized before them (QINCo, arXiv 2401.14732)."""

import torch.nn.functional as F
from torch import Tensor, nn


class ImplicitCodes(nn.Module):
    """Transforms codes by a condition: a projection of both and residual blocks. Keys are those of upstream's MLP.

    Args:
        dim: dimension D of codes and condition.
        dim_hidden: width of the blocks, D by default.
        depth: number of blocks.
        l2norm_output: give the results length 1.
    """

    def __init__(self, dim: int, dim_hidden: int | None = None, depth: int = 4, l2norm_output: bool = False) -> None:
        super().__init__()
        dim_hidden = dim if dim_hidden is None else dim_hidden
        self.l2norm_output = l2norm_output
        self.proj_in = nn.Linear(2 * dim, dim)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(dim, dim_hidden), nn.SiLU(), nn.Linear(dim_hidden, dim)) for _ in range(depth)]
        )

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Every code [H, K, D] under every condition [B, ..., D]: [H, B, N, K, D], N the product of the dots."""
        condition = condition.reshape(condition.shape[0], -1, condition.shape[-1])
        return self.transform(codes[:, None, None], condition[None, :, :, None])

    def transform(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Codes [..., D] under the condition [..., D] of the same place, in the dtype of the module; broadcast."""
        # The projection of each on its own, before they meet.
        of_condition, of_codes = self.proj_in.weight.chunk(2, dim=1)
        codes, condition = codes.to(of_codes.dtype), condition.to(of_codes.dtype)
        x = F.linear(condition, of_condition) + F.linear(codes, of_codes, self.proj_in.bias)
        for layer in self.layers:
            x = layer(x) + x
        return F.normalize(x, dim=-1) if self.l2norm_output else x
