"""Normalisation and rotation of the queries and keys of attention."""

import torch
import torch.nn.functional as F
from torch import Tensor


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm: str | None = "rms",
    across_heads: bool = False,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 1e-6,
    layout: str = "interleaved",
    numerics: str = "fp32",
) -> tuple[Tensor, Tensor | None]:
    def apply(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if numerics == "eager":
            return norm_rope(x, weight, bias, cos, sin, norm, across_heads, eps, layout)
        wide = _wide_type(x)
        weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
        return norm_rope(x.to(wide), weight, bias, cos, sin, norm, across_heads, eps, layout).to(x.dtype)

    return apply(q, q_weight, q_bias), None if k is None else apply(k, k_weight, k_bias)


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str | None,
    across_heads: bool,
    eps: float,
    layout: str,
) -> Tensor:
    """Normalises and rotates x [B, L, H, D] in the roundings of numerics="eager"."""
    x = normalize(x, weight, bias, norm, across_heads, eps)
    return x if cos is None or sin is None else rotate(x, cos, sin, layout)


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str | None, across_heads: bool, eps: float
) -> Tensor:
    """Normalises x [B, L, H, D] over D, or over H and D, in the roundings of numerics="eager"."""
    if norm is None:
        return x
    heads, dim = x.shape[2:]
    if across_heads:
        x = x.flatten(2)
        weight, bias = (None if t is None else _flat(t, heads, dim) for t in (weight, bias))
    if norm == "layer":
        shape = x.shape[-1:]
        if all(t is None or t.shape == shape for t in (weight, bias)):
            x = F.layer_norm(x, shape, weight, bias, eps)
        else:
            x = F.layer_norm(x, shape, None, None, eps)
            x = x if weight is None else x * weight
            x = x if bias is None else x + bias
    elif norm == "l2":
        x = F.normalize(x, dim=-1, eps=eps)
        x = x if weight is None else x * weight
    else:
        scaled = x * torch.rsqrt(x.to(_wide_type(x)).pow(2).mean(-1, keepdim=True) + eps)
        if weight is None:
            x = scaled.to(x.dtype)
        else:
            narrow = weight.dtype in (torch.bfloat16, torch.float16)
            x = (scaled.to(weight.dtype) if narrow else scaled) * weight
    return x.unflatten(2, (heads, dim)) if across_heads else x


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Rotates the first dimensions of x [B, L, H, D] by cos and sin [(B,) L, R / 2]."""
    cos, sin = (t.to(_wide_type(x)).unsqueeze(-2) for t in (cos, sin))
    part, rest = x.tensor_split([2 * cos.shape[-1]], -1)
    if layout == "interleaved":
        cos, sin = (t.repeat_interleave(2, -1) for t in (cos, sin))
        real, imaginary = part.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-imaginary, real], -1).flatten(-2)
    else:
        cos, sin = (torch.cat([t, t], -1) for t in (cos, sin))
        real, imaginary = part.chunk(2, -1)
        turned = torch.cat([-imaginary, real], -1)
    wide = _wide_type(x)
    out = (part.to(wide) * cos + turned.to(wide) * sin).to(x.dtype)
    return torch.cat([out, rest], -1) if rest.shape[-1] else out


def _flat(parameter: Tensor, heads: int, dim: int) -> Tensor:
    return parameter.reshape(-1) if parameter.numel() == heads * dim else parameter.expand(heads, dim).reshape(-1)


def _wide_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
