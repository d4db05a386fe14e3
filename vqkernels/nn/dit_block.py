"""The block of diffusion transformers on the fused operations."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vqkernels import ops, reference
from vqkernels.ops._checks import check_choice
from vqkernels.reference import dit_block
from vqkernels.reference.dit_block import EPS, check_condition, heads_first, merge_heads, split_heads

NUMERICS = ("fp32", "eager")

Stream = tuple[Tensor, Tensor | None, Tensor | None]  # x, branch and gate: a residual x + gate * branch to be added


def attention(self: Any, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, *, numerics: str) -> Tensor:
    """`reference.dit_block.Attention` with norm and rotation of q and k in one pass."""
    q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
    if self.qk_norm is not None or rope is not None:
        cos, sin = (None, None) if rope is None else rope
        options = {"norm": self.qk_norm, "eps": EPS, "numerics": numerics, **self.norm_parameters()}
        q, k = ops.qk_norm_rope(q, k, cos, sin, **options)  # type: ignore[assignment]
    q, k, v = heads_first(q, k, v)
    attend = F.scaled_dot_product_attention if numerics == "eager" else ops.attention
    return self.proj(merge_heads(attend(q, k, v)))


def cross_attention(self: Any, x: Tensor, context: Tensor, mask: Tensor | None = None, *, numerics: str) -> Tensor:
    """`reference.dit_block.CrossAttention` on `attention`."""
    q, k, v, mask = self.heads(x, context, mask)
    if numerics == "eager":
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
    return self.proj(merge_heads(ops.attention(q, k, v, mask=mask)))


def mlp(self: Any, x: Tensor, *, numerics: str) -> Tensor:
    """`reference.dit_block.Mlp` with bias and GELU in one pass."""
    if numerics == "eager":
        return self.fc2(self.act(self.fc1(x)))
    hidden = F.linear(x, self.fc1.weight)
    return self.fc2(ops.bias_gelu(hidden, self.fc1.bias.to(hidden.dtype), approximate="tanh"))


def swiglu(self: Any, x: Tensor, *, numerics: str) -> Tensor:
    """`reference.dit_block.SwiGLU` with bias, SiLU and product in one pass."""
    if numerics == "eager":
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)
    hidden = F.linear(x, self.w12.weight)
    return self.w3(ops.swiglu(hidden, bias=self.w12.bias.to(hidden.dtype)))


def advance(
    self: Any,
    stream: Stream,
    modulation: Tensor,
    rope: tuple[Tensor, Tensor] | None = None,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    *,
    numerics: str,
) -> Stream:
    """A `reference.DiTBlock`, from and to a stream whose last branch is still to be added: the next norm does it."""
    self.check_context(context)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
    x, y = normalized(stream, shift1, scale1, numerics)
    stream = x, self.attn(y, rope), gate1
    if context is not None:
        x = added(stream, numerics)
        stream = x, self.cross_attn(x, context, context_mask), None
    x, y = normalized(stream, shift2, scale2, numerics)
    return x, self.mlp(y), gate2


def added(stream: Stream, numerics: str) -> Tensor:
    """The stream with its branch."""
    x, branch, gate = stream
    return x if branch is None else ops.gate_residual(x, branch, gate, numerics=numerics)


def normalized(stream: Stream, shift: Tensor, scale: Tensor, numerics: str) -> tuple[Tensor, Tensor]:
    """The stream with its branch, and the modulated layer norm of it."""
    x, branch, gate = stream
    if branch is None:
        return x, ops.norm_modulate(x, shift, scale, eps=EPS, numerics=numerics)
    x, y = ops.gate_residual_norm_modulate(x, branch, gate, shift, scale, eps=EPS, numerics=numerics)
    return x, y


class Attention(dit_block.Attention):
    __doc__ = dit_block.Attention.__doc__

    numerics = "fp32"

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return attention(self, x, rope, numerics=self.numerics)


class CrossAttention(dit_block.CrossAttention):
    __doc__ = dit_block.CrossAttention.__doc__

    numerics = "fp32"

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        return cross_attention(self, x, context, mask, numerics=self.numerics)


class Mlp(dit_block.Mlp):
    __doc__ = dit_block.Mlp.__doc__

    numerics = "fp32"

    def forward(self, x: Tensor) -> Tensor:
        return mlp(self, x, numerics=self.numerics)


class SwiGLU(dit_block.SwiGLU):
    __doc__ = dit_block.SwiGLU.__doc__

    numerics = "fp32"

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(self, x, numerics=self.numerics)


class DiTBlock(reference.DiTBlock):
    """`reference.DiTBlock`, with its state_dict, in fewer passes over memory.

    `forward` is the block. In a stack call `advance` of one block after the other, and of a `FinalLayer` in the end:
    each residual then meets the next norm in one pass.

    Args:
        hidden_size: D.
        num_heads: heads of D / num_heads dimensions.
        mlp_ratio: width of the MLP over D; a SwiGLU has two thirds of it twice, so as many parameters.
        qk_norm: normalization of each head of q and k: None, "rms" or "layer".
        mlp: "gelu", with the tanh form of GELU, or "swiglu".
        cross_attention_dim: dimension of a context to attend to between the two; None: there is none.
        numerics: "fp32" rounds once at the end of every fused operation; "eager" where the reference rounds, so that
            values and gradients are bit for bit the reference's on the same device.

    Raises:
        ValueError: a size does not fit, or qk_norm, mlp or numerics is none of these.
    """

    attention_class = Attention
    cross_attention_class = CrossAttention
    mlp_class = Mlp
    swiglu_class = SwiGLU

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        qk_norm: str | None = None,
        mlp: str = "gelu",
        cross_attention_dim: int | None = None,
        numerics: str = "fp32",
    ) -> None:
        check_choice("numerics", numerics, NUMERICS)
        super().__init__(
            hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm, mlp=mlp, cross_attention_dim=cross_attention_dim
        )
        self.numerics = numerics
        for module in self.children():
            if isinstance(module, Attention | CrossAttention | Mlp | SwiGLU):
                module.numerics = numerics

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        check_condition(x, c, self.hidden_size)
        stream = self.advance((x, None, None), self.adaLN_modulation(c), rope, context, context_mask)
        return added(stream, self.numerics)

    def advance(
        self,
        stream: Stream,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Stream:
        """One block of a stack.

        Args:
            stream: (x, branch, gate), which stands for x + gate * branch [B, L, D]; branch and gate may be None.
            modulation: adaLN_modulation(c), [B, 6 D] or [B, L, 6 D].
            rope: see `reference.DiTBlock.forward`, as the other arguments.
            context: the same.
            context_mask: the same.

        Returns:
            The stream for the next block.
        """
        return advance(self, stream, modulation, rope, context, context_mask, numerics=self.numerics)

    forward.__doc__ = reference.DiTBlock.forward.__doc__
