"""RMSNorm per head and rotary embedding of queries and keys, [B, L, H, D], views of one tensor of q, k and v."""

import torch
from torch import Tensor

import vqkernels
from benchmarks.denoising import Shape, operations

CASES = [
    Shape("DiT-XL", "published", (4, 256, 16, 72)),
    Shape("Flux", "published", (1, 1024, 24, 128)),
    Shape("Flux", "published", (1, 1024, 24, 128), "bfloat16"),
]


def tables_of(case_length: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(case_length), 10000.0 ** (-torch.arange(0, dim, 2) / dim))
    return angles.cos().to(device), angles.sin().to(device)


def inputs(case: Shape, device: torch.device) -> list[Tensor]:
    batch, length, heads, dim = case.sizes
    return case.randn(device, (batch, length, 3, heads, dim), (dim,), (dim,))


def ours(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
    q, k, _ = qkv.unbind(2)
    cos, sin = _rope(qkv)
    return vqkernels.qk_norm_rope(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight)


def plain(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
    q, k, _ = qkv.unbind(2)
    cos, sin = (t.repeat_interleave(2, -1).unsqueeze(1) for t in _rope(qkv))
    return _norm_and_rotate(q, q_weight, cos, sin), _norm_and_rotate(k, k_weight, cos, sin)


def _norm_and_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight
    even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([-odd, even], -1).flatten(-2)
    wide, rotated = (t if t.dtype == torch.float64 else t.float() for t in (normed, rotated))
    return (wide * cos + rotated * sin).to(x.dtype)


_tables: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}


def _rope(qkv: Tensor) -> tuple[Tensor, Tensor]:
    key = (qkv.shape[1], qkv.shape[-1], qkv.device)
    if key not in _tables:
        _tables[key] = tables_of(*key)
    return _tables[key]


tables = operations("qk_norm_rope", CASES, ours, plain, inputs)
