"""The transformer blocks of latent diffusion's U-Net on the fused operations."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vqkernels import ops, reference
from vqkernels.nn.dit_block import NUMERICS
from vqkernels.ops._checks import check_choice
from vqkernels.reference import spatial_transformer
from vqkernels.reference.dit_block import merge_heads
from vqkernels.reference.spatial_transformer import as_tokens, from_tokens


def transform_map(self: Any, x: Tensor, context: Tensor | None = None, *, numerics: str) -> Tensor:
    """`reference.SpatialTransformer` with a fused group norm."""
    self.check_context(context)
    norm = self.norm
    if numerics == "eager":
        h = norm(x)
    else:
        h = ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, activation="none")
    h = as_tokens(self.proj_in(h))
    for block in self.transformer_blocks:
        h = block(h, context)
    return x + self.proj_out(from_tokens(h, x))


def transform_tokens(self: Any, x: Tensor, context: Tensor | None = None, *, numerics: str) -> Tensor:
    """`reference.spatial_transformer.TransformerBlock` with each residual and the norm after it in one pass."""

    def normalized(norm: Any, x: Tensor, branch: Tensor) -> tuple[Tensor, ...]:
        affine = {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
        return ops.gate_residual_norm_modulate(x, branch, **affine, numerics=numerics)

    norm = self.norm1
    y = ops.norm_modulate(x, weight=norm.weight, bias=norm.bias, eps=norm.eps, numerics=numerics)
    x, y = normalized(self.norm2, x, self.attn1(y))
    x, y = normalized(self.norm3, x, self.attn2(y, context))
    return x + self.ff(y)


def attend(self: Any, x: Tensor, context: Tensor | None = None, *, numerics: str) -> Tensor:
    """`reference.spatial_transformer.ContextAttention` on `attention`."""
    q, k, v = self.heads(x, context)
    attention = F.scaled_dot_product_attention if numerics == "eager" else ops.attention
    return self.to_out(merge_heads(attention(q, k, v)))


def geglu(self: Any, x: Tensor, *, numerics: str) -> Tensor:
    """`reference.spatial_transformer.GEGLU` with bias, GELU and product in one pass."""
    if numerics == "eager":
        a, b = self.proj(x).chunk(2, -1)
        return a * F.gelu(b)
    hidden = F.linear(x, self.proj.weight)
    return ops.geglu(hidden, bias=self.proj.bias.to(hidden.dtype))


class GEGLU(spatial_transformer.GEGLU):
    __doc__ = spatial_transformer.GEGLU.__doc__

    numerics = "fp32"

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self, x, numerics=self.numerics)


class FeedForward(spatial_transformer.FeedForward):
    __doc__ = spatial_transformer.FeedForward.__doc__

    geglu_class = GEGLU


class ContextAttention(spatial_transformer.ContextAttention):
    __doc__ = spatial_transformer.ContextAttention.__doc__

    numerics = "fp32"

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return attend(self, x, context, numerics=self.numerics)


class TransformerBlock(spatial_transformer.TransformerBlock):
    __doc__ = spatial_transformer.TransformerBlock.__doc__

    attention_class = ContextAttention
    feed_forward_class = FeedForward
    numerics = "fp32"

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return transform_tokens(self, x, context, numerics=self.numerics)


class SpatialTransformer(reference.SpatialTransformer):
    """`reference.SpatialTransformer`, with its state_dict, in fewer passes over memory.

    Args:
        *args: those of `reference.SpatialTransformer`.
        numerics: "fp32" or "eager", see `DiTBlock`.
        **kwargs: those of `reference.SpatialTransformer`.

    Raises:
        ValueError: an argument is out of range.
    """

    block_class = TransformerBlock

    def __init__(self, *args: Any, numerics: str = "fp32", **kwargs: Any) -> None:
        check_choice("numerics", numerics, NUMERICS)
        super().__init__(*args, **kwargs)
        self.numerics = numerics
        for module in self.modules():
            if isinstance(module, GEGLU | ContextAttention | TransformerBlock):
                module.numerics = numerics

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return transform_map(self, x, context, numerics=self.numerics)

    forward.__doc__ = reference.SpatialTransformer.forward.__doc__
