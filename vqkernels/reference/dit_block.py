"""The block of diffusion transformers (DiT): Peebles & Xie, arXiv 2212.09748, section 3.2."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.reference._checks import FLOAT_TYPES, check_tensor
from vqkernels.reference.qk_norm_rope import qk_norm_rope

QK_NORMS: dict[str, Callable[..., nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
EPS = 1e-6


class Attention(nn.Module):
    """Self-attention over tokens [B, L, D], with one projection for q, k and v."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: str | None = None) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if qk_norm is not None and qk_norm not in QK_NORMS:
            raise ValueError(f'qk_norm: expected None, "rms" or "layer", got {qk_norm!r}')
        self.num_heads = num_heads
        self.qk_norm = qk_norm
        self.qkv = nn.Linear(dim, 3 * dim)
        if qk_norm is not None:
            self.q_norm = QK_NORMS[qk_norm](dim // num_heads, eps=EPS)
            self.k_norm = QK_NORMS[qk_norm](dim // num_heads, eps=EPS)
        self.proj = nn.Linear(dim, dim)

    def norm_parameters(self) -> dict[str, Any]:
        """Weights and biases of the norms of q and k, under the names that `qk_norm_rope` has for them."""
        return {
            f"{part}_{name}": parameter
            for part in ("q", "k")
            if self.qk_norm is not None
            for name, parameter in getattr(self, f"{part}_norm").named_parameters()
        }

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        if self.qk_norm is not None or rope is not None:
            cos, sin = (None, None) if rope is None else rope
            options = {"norm": self.qk_norm, "eps": EPS, "numerics": "eager", **self.norm_parameters()}
            q, k = qk_norm_rope(q, k, cos, sin, **options)  # type: ignore[assignment]
        q, k, v = heads_first(q, k, v)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class CrossAttention(nn.Module):
    """Attention of tokens [B, L, D] to a context [B, S, context_dim]."""

    def __init__(self, dim: int, num_heads: int, context_dim: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor, context: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries [B, H, L, D], keys and values [B, H, S, D], and the mask [B, S] as [B, 1, 1, S]."""
        (q,) = split_heads(self.q_linear(x), 1, self.num_heads)
        k, v = split_heads(self.kv_linear(context), 2, self.num_heads)
        return *heads_first(q, k, v), None if mask is None else mask[:, None, None]

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v, mask = self.heads(x, context, mask)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), with the tanh form of GELU."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with a, b = w12(x) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * width)
        self.w3 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)


class DiTBlock(nn.Module):
    """Self-attention and an MLP, each normalized, modulated and gated by a condition (adaLN-Zero).

        x = x + gate1 * attention(norm(x) (1 + scale1) + shift1)
        x = x + gate2 * mlp(norm(x) (1 + scale2) + shift2)

    shift1, scale1, gate1, shift2, scale2, gate2 = Linear(SiLU(c)) start as 0, so that a new block is the identity. The
    state_dict is that of the published model; the options have the keys of LightningDiT (arXiv 2501.01423:
    `attn.q_norm`, `attn.k_norm`, `mlp.w12`, `mlp.w3`) and PixArt (arXiv 2310.00426: `cross_attn.q_linear`,
    `cross_attn.kv_linear`, `cross_attn.proj`).

    Args:
        hidden_size: D.
        num_heads: heads of D / num_heads dimensions.
        mlp_ratio: width of the MLP over D; a SwiGLU has two thirds of it twice, so as many parameters.
        qk_norm: normalization of each head of q and k: None, "rms" or "layer".
        mlp: "gelu", with the tanh form of GELU, or "swiglu".
        cross_attention_dim: dimension of a context to attend to between the two; None: there is none.

    Raises:
        ValueError: a size does not fit, or qk_norm or mlp is none of these.
    """

    attention_class: type[Attention] = Attention
    cross_attention_class: type[CrossAttention] = CrossAttention
    mlp_class: type[Mlp] = Mlp
    swiglu_class: type[SwiGLU] = SwiGLU

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        qk_norm: str | None = None,
        mlp: str = "gelu",
        cross_attention_dim: int | None = None,
    ) -> None:
        super().__init__()
        if mlp not in ("gelu", "swiglu"):
            raise ValueError(f'mlp: expected "gelu" or "swiglu", got {mlp!r}')
        width = int(hidden_size * mlp_ratio)
        if width < 2:
            raise ValueError(f"mlp_ratio: expected at least 2 / {hidden_size}, got {mlp_ratio}")
        self.hidden_size = hidden_size
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=EPS)
        self.attn = self.attention_class(hidden_size, num_heads, qk_norm=qk_norm)
        if cross_attention_dim is not None:
            self.cross_attn = self.cross_attention_class(hidden_size, num_heads, cross_attention_dim)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=EPS)
        self.mlp: Mlp | SwiGLU
        if mlp == "gelu":
            self.mlp = self.mlp_class(hidden_size, width)
        else:
            self.mlp = self.swiglu_class(hidden_size, 2 * width // 3)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.reset_parameters()

    @property
    def has_context(self) -> bool:
        return hasattr(self, "cross_attn")

    def reset_parameters(self) -> None:
        """The published initialization: Xavier uniform, biases 0; the modulation and what adds the context 0."""
        self.apply(reset_linear)
        reset_to_zero(self.adaLN_modulation[1])
        if self.has_context:
            reset_to_zero(self.cross_attn.proj)

    def check_context(self, context: Tensor | None) -> None:
        if (context is not None) != self.has_context:
            expected = "a context" if self.has_context else "None without cross_attention_dim"
            raise ValueError(f"context: expected {expected}, got {type(context).__name__}")

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Transforms tokens.

        Args:
            x: [B, L, D].
            c: the condition, [B, D]; or [B, L, D], one for each token.
            rope: cosines and sines of rotary positions, each [L, R / 2], for interleaved pairs of the first R
                dimensions of a head of q and k.
            context: [B, S, cross_attention_dim], where there is such an attention.
            context_mask: bool [B, S], True where a token may be attended to.

        Returns:
            [B, L, D].

        Raises:
            TypeError: x or c is no tensor of floating-point numbers.
            ValueError: x or c has another shape, a context is missing, or there is nothing that attends to it.
        """
        check_condition(x, c, self.hidden_size)
        self.check_context(context)
        modulation = self.adaLN_modulation(c)
        modulation = modulation.unsqueeze(1) if modulation.ndim < x.ndim else modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        if context is not None:
            x = x + self.cross_attn(x, context, context_mask)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The modulation x (1 + scale) + shift, broadcast."""
    return x * (1 + scale) + shift


def split_heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """The parts [B, L, H, D] of projections [B, L, parts H D], as views."""
    return x.unflatten(-1, (parts, num_heads, -1)).unbind(-3)


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, H, L, D] of [B, L, H, D]."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, L, H D] of [B, H, L, D]."""
    return x.transpose(1, 2).flatten(2)


def check_condition(x: Tensor, c: Tensor, dim: int) -> None:
    """Checks for tokens x [B, L, dim] and a condition [B, dim] or [B, L, dim], whose B and L may be 1."""
    for name, value in (("x", x), ("c", c)):
        check_tensor(name, value, FLOAT_TYPES)
    if x.ndim != 3 or x.shape[2] != dim:
        raise ValueError(f"x: expected shape [B, L, {dim}], got {list(x.shape)}")
    batch, length, _ = x.shape
    sizes = c.shape[:-1]
    fits = c.ndim in (2, 3) and c.shape[-1] == dim
    if not fits or any(size not in (1, whole) for size, whole in zip(sizes, (batch, length), strict=False)):
        raise ValueError(
            f"c: expected shape [{batch}, {dim}] or [{batch}, {length}, {dim}] to match x of shape {list(x.shape)}, "
            f"got {list(c.shape)}"
        )


def check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of {dim}, got {num_heads}")


def reset_linear(module: nn.Module) -> None:
    """Xavier uniform weights and biases 0, where a module is a linear layer."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def reset_to_zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()
