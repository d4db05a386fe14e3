"""The attention block of VQGAN and latent diffusion (arXiv 2012.09841, arXiv 2112.10752)."""

import torch.nn.functional as F
from torch import Tensor, nn


class AttnBlock(nn.Module):
    """x + proj_out(attention(q, k, v)): one head over all positions of a map, q, k and v from its group norm.

    The state_dict is that of taming-transformers and latent-diffusion.

    Args:
        in_channels: C, a multiple of num_groups.
        num_groups: groups of the norm.

    Raises:
        ValueError: in_channels is not a multiple of num_groups.
    """

    def __init__(self, in_channels: int, *, num_groups: int = 32) -> None:
        super().__init__()
        check_groups(in_channels, num_groups)
        self.norm = nn.GroupNorm(num_groups, in_channels, eps=1e-6)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """A map [B, C, H, W] to one of the same shape."""
        h = self.norm(x)
        q, k, v = (as_single_head(t) for t in (self.q(h), self.k(h), self.v(h)))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(as_map(h, x))


def as_single_head(x: Tensor) -> Tensor:
    """Positions [B, 1, H W, C] of a map [B, C, H, W], side by side, without which torch makes all scores at once."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()


def as_map(x: Tensor, like: Tensor) -> Tensor:
    """A map [B, C, H, W], of the height and width of another, of positions [B, 1, H W, C]."""
    return x.squeeze(1).transpose(1, 2).unflatten(2, like.shape[2:])


def check_groups(channels: int, num_groups: int) -> None:
    if num_groups < 1 or channels < 1 or channels % num_groups:
        raise ValueError(f"in_channels: expected a multiple of {num_groups} groups, got {channels}")
