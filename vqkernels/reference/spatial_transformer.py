"""The transformer blocks of latent diffusion's U-Net: Rombach et al., arXiv 2112.10752, section 3.3."""

import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.reference.attn_block import check_groups
from vqkernels.reference.dit_block import heads_first, merge_heads, reset_to_zero, split_heads


class GEGLU(nn.Module):
    """a * gelu(b) with a, b = Linear(x) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.proj(x).chunk(2, -1)
        return a * F.gelu(b)


class FeedForward(nn.Module):
    """A GEGLU to 4 D and a linear layer back."""

    geglu_class: type[GEGLU] = GEGLU

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(self.geglu_class(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ContextAttention(nn.Module):
    """Attention of tokens [B, L, D] to a context [B, S, context_dim], or to themselves."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, context_dim: int | None) -> None:
        super().__init__()
        inner, context_dim = num_heads * head_dim, dim if context_dim is None else context_dim
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Identity())

    def heads(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, L, D], keys and values [B, H, S, D]."""
        context = x if context is None else context
        q, k, v = (split_heads(t, 1, self.num_heads)[0] for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return heads_first(q, k, v)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x, context)
        return self.to_out(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class TransformerBlock(nn.Module):
    """Self-attention, attention to a context and a GEGLU MLP on tokens [B, L, D], each added after a layer norm."""

    attention_class: type[ContextAttention] = ContextAttention
    feed_forward_class: type[FeedForward] = FeedForward

    def __init__(self, dim: int, num_heads: int, head_dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.attn1 = self.attention_class(dim, num_heads, head_dim, None)
        self.ff = self.feed_forward_class(dim)
        self.attn2 = self.attention_class(dim, num_heads, head_dim, context_dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """x + proj_out(blocks(proj_in(norm(x)))): transformer blocks over all positions of a map.

    `proj_out` starts as 0. The state_dict is that of latent-diffusion.

    Args:
        in_channels: C, a multiple of num_groups.
        num_heads: heads of each attention.
        head_dim: dimensions of a head; the blocks have num_heads head_dim.
        depth: blocks.
        context_dim: dimension of the context that the second attention of a block attends to; None: the block itself.
        num_groups: groups of the norm.

    Raises:
        ValueError: in_channels is not a multiple of num_groups, or another size is below 1.
    """

    block_class: type[TransformerBlock] = TransformerBlock

    def __init__(
        self,
        in_channels: int,
        num_heads: int,
        head_dim: int,
        depth: int = 1,
        context_dim: int | None = None,
        *,
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        check_groups(in_channels, num_groups)
        for name, value in (("num_heads", num_heads), ("head_dim", head_dim), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        dim = num_heads * head_dim
        self.context_dim = context_dim
        self.norm = nn.GroupNorm(num_groups, in_channels, eps=1e-6)
        self.proj_in = nn.Conv2d(in_channels, dim, 1)
        self.transformer_blocks = nn.ModuleList(
            self.block_class(dim, num_heads, head_dim, context_dim) for _ in range(depth)
        )
        self.proj_out = nn.Conv2d(dim, in_channels, 1)
        reset_to_zero(self.proj_out)

    def check_context(self, context: Tensor | None) -> None:
        if (context is None) != (self.context_dim is None):
            expected = "None without context_dim" if self.context_dim is None else "a context"
            raise ValueError(f"context: expected {expected}, got {type(context).__name__}")

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """A map [B, C, H, W] to one of the same shape; context: [B, S, context_dim], where there is such a dimension.

        Raises:
            ValueError: a context is missing, or there is nothing that attends to it.
        """
        self.check_context(context)
        h = as_tokens(self.proj_in(self.norm(x)))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(from_tokens(h, x))


def as_tokens(x: Tensor) -> Tensor:
    """[B, H W, C] of a map [B, C, H, W]."""
    return x.flatten(2).transpose(1, 2).contiguous()


def from_tokens(x: Tensor, like: Tensor) -> Tensor:
    """A map [B, C, H, W], of the height and width of another, of tokens [B, H W, C]."""
    return x.transpose(1, 2).unflatten(2, like.shape[2:])
