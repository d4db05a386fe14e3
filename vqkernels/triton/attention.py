"""Scaled dot-product attention, forward and backward: what kernels of attention_kernels.py are launched with."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vqkernels.reference._checks import FLOAT_TYPES, check_device, check_tensor
from vqkernels.triton._checks import check_like
from vqkernels.triton.attention_kernels import (
    attention_kernel,
    backward_kv_kernel,
    backward_q_kernel,
    inner_kernel,
)


class _Blocks(NamedTuple):
    """What one program holds: rows of its own, rows of the other side, columns of a product and of its results."""

    own: int
    other: int
    step: int
    part: int
    warps: int
    stages: int


def _blocks(dtype: torch.dtype, width: int, *, results: int) -> _Blocks:
    """What fits the registers and the shared memory of compute capability 8.0, with `results` tensors of sums."""
    wide = triton.next_power_of_2(max(width, 16))
    if dtype == torch.float64:
        return _Blocks(own=16, other=16, step=16, part=min(wide, 64 // results), warps=4, stages=1)
    if dtype == torch.float32:
        return _Blocks(
            own=32, other=32, step=min(wide, 32), part=min(wide, 128 // results), warps=4 * results, stages=1
        )
    return _Blocks(
        own=64,
        other=64 if wide <= 128 else 32,
        step=min(wide, 64),
        part=min(wide, 512 // results),
        warps=8 if wide > 64 or results > 1 else 4,
        stages=2,
    )


class _Problem(NamedTuple):
    """Tensors whose columns lie side by side, and sizes."""

    q: Tensor  # [B, H, L, D]
    k: Tensor  # [B, Hk, S, D]
    v: Tensor  # [B, Hk, S, Dv]
    mask: Tensor | None  # [B, H, L, S]
    dtype: torch.dtype  # of scores and sums: float32, or float64

    @property
    def mask_strides(self) -> tuple[int, ...]:
        return (0, 0, 0, 0) if self.mask is None else self.mask.stride()


def _with_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _problem(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> _Problem:
    """Checks what memory safety needs of a direct torch.ops call."""
    check_tensor("q", q, FLOAT_TYPES)
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, value, (q.dtype,))
        check_device(name, value, "q", q)
        torch._check(
            value.ndim == 4 and value.shape[3] > 0,
            lambda: "vqkernels: expected q, k and v of shapes [B, H, L, D], [B, Hk, S, D] and [B, Hk, S, Dv]",
        )
    batch, heads, length, width = q.shape
    key_heads, keys = k.shape[1:3]
    check_like("k", k, (q.dtype,), (batch, key_heads, keys, width), "q", q)
    check_like("v", v, (q.dtype,), (batch, key_heads, keys, v.shape[3]), "k", k)
    torch._check(
        heads % key_heads == 0 if key_heads else heads == 0,
        lambda: f"vqkernels: expected heads that are a multiple of key heads, got {heads} and {key_heads}",
    )
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if mask is not None:
        check_tensor("mask", mask, (torch.bool, *FLOAT_TYPES))
        check_device("mask", mask, "q", q)
        mask = mask.expand(batch, heads, length, keys)
    return _Problem(_with_columns(q), _with_columns(k), _with_columns(v), mask, dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, L, Dv] of q [B, H, L, D], k [B, Hk, S, D] and v [B, Hk, S, Dv], in their dtype.

    Also the log-sum-exp of the scores [B, H, L], float32 (float64 for float64), +Inf for a row without a key.
    """
    problem = _problem(q, k, v, mask)
    batch, heads, length, width = q.shape
    key_heads, keys, v_width = v.shape[1:]
    out = q.new_empty((batch, length, heads, v_width)).transpose(1, 2)
    logsumexp = q.new_empty(q.shape[:3], dtype=problem.dtype)
    size = _blocks(q.dtype, v_width, results=1)
    blocks = triton.cdiv(length, size.own)
    programs = batch * heads * blocks * triton.cdiv(v_width, size.part)
    if programs == 0:
        return out, logsumexp
    with torch.cuda.device_of(q):
        attention_kernel[(programs,)](
            *(problem.q, problem.k, problem.v, problem.mask, out, logsumexp),
            *(heads, heads // key_heads, length, keys, blocks, scale),
            *(*problem.q.stride()[:3], *problem.k.stride()[:3], *problem.v.stride()[:3], *problem.mask_strides),
            *out.stride()[:3],
            **_constants(causal, width, v_width, size, size.own, size.other),
        )
    return out, logsumexp


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the result of `attention`, [B, H, L, Dv]."""
    problem = _problem(q, k, v, mask)
    batch, heads, length, width = q.shape
    key_heads, keys, v_width = v.shape[1:]
    for name, value in (("grad_out", grad_out), ("out", out)):
        check_like(name, value, (q.dtype,), (batch, heads, length, v_width), "q", q)
    check_like("logsumexp", logsumexp, (problem.dtype,), (batch, heads, length), "q", q)
    grad_out, out, logsumexp = _with_columns(grad_out), _with_columns(out), logsumexp.contiguous()
    grad_q, grad_k, grad_v = (t.new_zeros(t.shape) if 0 in q.shape else t.new_empty(t.shape) for t in (q, k, v))
    if batch == 0 or heads == 0 or length == 0:
        return grad_q, grad_k, grad_v
    inner = torch.empty_like(logsumexp)
    inputs = (grad_out, problem.q, problem.k, problem.v, problem.mask, logsumexp, inner)
    strides = (
        *(*grad_out.stride()[:3], *problem.q.stride()[:3], *problem.k.stride()[:3], *problem.v.stride()[:3]),
        *problem.mask_strides,
    )
    of_q, of_kv = _blocks(q.dtype, width, results=1), _blocks(q.dtype, max(width, v_width), results=2)
    q_blocks, kv_blocks = triton.cdiv(length, of_q.own), triton.cdiv(keys, of_kv.own)
    with torch.cuda.device_of(q):
        inner_kernel[(batch * heads * triton.cdiv(length, 16),)](
            *(grad_out, out, inner, heads, length, triton.cdiv(length, 16)),
            *(*grad_out.stride()[:3], *out.stride()[:3]),
            WIDTH=v_width,
            ROWS=16,
            COLUMNS=min(triton.next_power_of_2(v_width), 128),
        )
        backward_q_kernel[(batch * heads * q_blocks * triton.cdiv(width, of_q.part),)](
            *(*inputs, grad_q, heads, heads // key_heads, length, keys, q_blocks, scale, *strides),
            **_constants(causal, width, v_width, of_q, of_q.own, of_q.other),
        )
        if keys:
            backward_kv_kernel[(batch * key_heads * kv_blocks * triton.cdiv(max(width, v_width), of_kv.part),)](
                *(*inputs, grad_k, grad_v, heads, heads // key_heads, length, keys, kv_blocks, scale, *strides),
                **_constants(causal, width, v_width, of_kv, of_kv.other, of_kv.own),
            )
    return grad_q, grad_k, grad_v


def _constants(causal: bool, width: int, v_width: int, size: _Blocks, queries: int, keys: int) -> dict[str, Any]:
    return {
        "CAUSAL": causal,
        "WIDTH": width,
        "V_WIDTH": v_width,
        "QUERIES": queries,
        "KEYS": keys,
        "COLUMNS": size.step,
        "PART": size.part,
        "num_warps": size.warps,
        "num_stages": size.stages,
    }
