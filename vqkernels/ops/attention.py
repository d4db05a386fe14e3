"""Scaled dot-product attention, forward and backward in memory that grows with L + S, not with L x S."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqkernels import reference
from vqkernels.ops import _backend, _chunked_attention
from vqkernels.reference._checks import FLOAT_TYPES, check_device, check_numbers, check_tensor


def _shape_rule(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    out = q.new_empty((batch, length, heads, v.shape[3])).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _backward_shape_rule(
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
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_backend.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> (Tensor out, Tensor logsumexp)",
    _shape_rule,
    cuda_kernels=False,
)
_backend.define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor logsumexp, "
    "bool causal, float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    _backward_shape_rule,
    cuda_kernels=False,
)
_backend.library.impl("attention", _chunked_attention.attention, "CPU")
_backend.library.impl("attention_backward", lambda *args: _chunked_attention.attention_backward(*args)[:3], "CPU")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        backend: str | None,
    ) -> Tensor:
        out, logsumexp = _backend.implementation("attention", backend)(q, k, v, mask, causal, scale)
        ctx.save_for_backward(q, k, v, mask, out, logsumexp)
        ctx.options = (causal, scale, backend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        causal, scale, backend = ctx.options
        q, k, v, mask, out, logsumexp = ctx.saved_tensors
        saved = (grad_out, q, k, v, mask, out, logsumexp, causal, scale)
        if ctx.needs_input_grad[3]:
            grads = _chunked_attention.attention_backward(*saved, True)
        else:
            grads = (*_backend.implementation("attention_backward", backend)(*saved), None)
        wanted = zip(grads, ctx.needs_input_grad, strict=False)
        return *(g if needed else None for g, needed in wanted), None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v (Vaswani et al., arXiv 1706.03762, equation 1), in memory O(L + S).

    torch's `scaled_dot_product_attention` does the work wherever it has a kernel that keeps this memory, is exact and
    repeats its gradients to the bit; `why_not_sdpa` says where it has none. There parts of the queries go through
    matrix products of torch on CPU, and a Triton kernel serves CUDA. Scores and softmax are computed in float32
    (float64 for float64). A query without a key (masked, or S = 0) gives zeros, and zero gradients. Gradients are
    bitwise the same from run to run.

    Args:
        q: [B, H, L, D], D at least 1; float32, float64, bfloat16 or float16. Any strides; under autocast q, k and v
            are cast as torch casts them for its own.
        k: [B, Hk, S, D] in the dtype of q. H is a multiple of Hk: query head h meets key head h // (H / Hk).
        v: [B, Hk, S, Dv] in the dtype of q.
        mask: of a shape that broadcasts to [B, H, L, S]; bool (True: takes part) or floating (added to the scores).
            An additive mask may require gradients.
        causal: query i sees the keys up to i alone; may be joined with a mask.
        scale: of the scores; None: 1 / sqrt(D).
        backend: None (what suits inputs and device), "native" (the parts on CPU), "triton" (the kernel, which has no
            gradient of a mask) or "reference".

    Returns:
        [B, H, L, Dv] in the dtype of q.

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, dtypes, devices or backend do not fit.
        RuntimeError: the backend asked for cannot serve the call.
    """
    if torch.is_autocast_enabled(q.device.type if isinstance(q, Tensor) else "cpu"):
        q, k, v = (_cast(t) for t in (q, k, v))
    _check(q, k, v)
    mask = _checked_mask(q, k, mask)
    check_numbers(**({} if scale is None else {"scale": scale}))
    chosen = _backend.resolve(backend, q, cuda_kernels=False)
    if chosen == "reference":
        return reference.attention(q, k, v, mask=mask, causal=causal, scale=scale)
    if chosen == "triton" and mask is not None and mask.requires_grad and torch.is_grad_enabled():
        raise RuntimeError('backend="triton" cannot serve this call: the kernel has no gradient of a mask')
    if chosen is None and why_not_sdpa(q, k, v, mask=mask, causal=causal) is None:
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        grouped = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _Attention.apply(q, k, v, mask, causal, scale, chosen)


def why_not_sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> str | None:
    """Why `attention` does not leave these arguments, which fit, to torch; None where it does.

    What torch's kernels take was read off `torch._fused_sdp_choice` of torch 2.10, 2.13 and 2.15 on CPU; for CUDA it
    is what the conditions of its flash and memory-efficient kernels say.
    """
    if not (q.numel() and k.numel() and v.numel()):
        return "torch makes the whole matrix of scores for empty inputs"
    if mask is not None and causal:
        return "torch takes a mask or causal=True, not both"
    if v.shape[3] != q.shape[3]:
        return f"torch makes the whole matrix of scores where v has other columns than q ({v.shape[3]}, {q.shape[3]})"
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if torch.is_grad_enabled() and mask is not None and mask.requires_grad:
        return "torch makes the whole matrix of scores for the gradient of a mask"
    return None if q.device.type != "cuda" else _why_not_on_cuda(q, k, mask, causal, needs_gradient)


def _why_not_on_cuda(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, needs_gradient: bool) -> str | None:
    dtype, dim = _name(q), q.shape[3]
    unequal = causal and q.shape[2] != k.shape[2]
    if dim > 256:
        return f"torch's fast kernels have heads of at most 256 columns, not {dim}"
    if q.dtype == torch.float64:
        return "torch makes the whole matrix of scores for float64 on cuda"
    if mask is not None or unequal or q.dtype == torch.float32:  # not its flash kernel, but the memory-efficient one
        what = f"{dtype} with a mask" if mask is not None else f"causal {dtype} of L != S" if unequal else dtype
        multiple = 4 if q.dtype == torch.float32 else 8
        if dim % multiple:
            return f"torch's kernel for {what} needs heads of a multiple of {multiple} columns, not {dim}"
        if k.shape[1] != q.shape[1]:
            return f"torch's kernel for {what} needs as many key heads as query heads"
        if mask is not None and mask.dtype not in (torch.bool, q.dtype):
            return f"torch's kernel for {what} needs a mask of bool or {dtype}"
    deterministic = torch.are_deterministic_algorithms_enabled()
    if needs_gradient and not (deterministic and not torch.is_deterministic_algorithms_warn_only_enabled()):
        return "gradients of torch's kernels repeat only under torch.use_deterministic_algorithms(True)"
    return None


def _cast(value: object) -> Any:
    """As autocast casts the arguments of torch's function."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(torch.get_autocast_dtype(value.device.type))
    return value


def _name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, value, FLOAT_TYPES)
        check_device(name, value, "q", q)
        if value.ndim != 4 or value.shape[3] == 0:
            layout = "[B, H, L, D]" if name == "q" else "[B, Hk, S, D]"
            raise ValueError(f"{name}: expected shape {layout} with D at least 1, got {list(value.shape)}")
        if value.dtype != q.dtype:
            raise ValueError(f"{name}: expected {_name(q)} to match q, got {_name(value)}")
    batch, heads, _, dim = q.shape
    key_heads, keys = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != dim or (heads % key_heads if key_heads else heads):
        raise ValueError(
            f"k: expected shape [{batch}, Hk, S, {dim}], Hk a divisor of {heads}, to match q of shape "
            f"{list(q.shape)}, got {list(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v: expected shape [{batch}, {key_heads}, {keys}, Dv] to match k of shape {list(k.shape)}, "
            f"got {list(v.shape)}"
        )


def _checked_mask(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask with four dimensions; bool, in the dtype of q, or in that of the scores."""
    if mask is None:
        return None
    check_tensor("mask", mask, (torch.bool, *FLOAT_TYPES))
    check_device("mask", mask, "q", q)
    shape = (*q.shape[:3], k.shape[2])
    padded = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if mask.ndim > 4 or any(size not in (1, whole) for size, whole in zip(padded, shape, strict=True)):
        raise ValueError(
            f"mask: expected a shape that broadcasts to {list(shape)}, as [B, H, L, S] of q of shape {list(q.shape)} "
            f"and k of shape {list(k.shape)}, got {list(mask.shape)}"
        )
    mask = mask.reshape(padded)
    if mask.dtype not in (torch.bool, q.dtype):
        mask = mask.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return mask
