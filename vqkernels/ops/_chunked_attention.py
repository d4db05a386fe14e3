"""Attention in matrix products of torch, a part of the queries at a time: memory for 2^20 scores, or for 16 rows."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

_SCORES = 2**20
_LEAST_ROWS = 16

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _without_autocast(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """What is wide here stays wide."""

    @wraps(function)
    def call(*args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **options)

    return call


class _Part(NamedTuple):
    """Where a part lies in tensors [B, H, L, ...] of queries and in [B, Hk, ...] of keys."""

    queries: tuple[slice, slice, slice]
    keys: tuple[slice, slice]


def _parts(q: Tensor, k: Tensor) -> Iterator[_Part]:
    """Whole batch elements where several fit, else whole heads, else rows; the heads of one key stay together."""
    batch, heads, length, _ = q.shape
    key_heads, keys = k.shape[1:3]
    group = heads // max(key_heads, 1)
    head_scores = max(length * keys, 1)
    batch_step = max(_SCORES // max(heads * head_scores, 1), 1)
    key_head_step = min(max(_SCORES // max(group * head_scores, 1), 1), max(key_heads, 1))
    row_step = max(_SCORES // max(group * key_head_step * keys, 1), _LEAST_ROWS)
    for b in range(0, batch, batch_step):
        for h in range(0, key_heads, key_head_step):
            for row in range(0, length, row_step):
                of_batch, last = slice(b, b + batch_step), h + key_head_step
                yield _Part(
                    (of_batch, slice(h * group, last * group), slice(row, row + row_step)), (of_batch, slice(h, last))
                )


def _by_key_head(t: Tensor, key_heads: int) -> Tensor:
    """[b, h, l, d] -> [b, key_heads, h / key_heads * l, d]."""
    batch, heads, length, dim = t.shape
    return t.reshape(batch, key_heads, heads // key_heads * length, dim)


def _scores(q: Tensor, k: Tensor, part: _Part, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """[b, h, l, S] of a part whose queries q and keys k are [b, h, l, D] and [b, hk, S, D]."""
    scores = _by_key_head(q * scale, k.shape[1]) @ k.transpose(-1, -2)
    scores = scores.reshape(*q.shape[:3], k.shape[2])
    if mask is not None:
        mask = mask[part.queries]
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, -torch.inf)
        else:
            scores += mask
    if causal:
        row = torch.arange(part.queries[2].start, part.queries[2].start + q.shape[2], device=q.device)
        scores.masked_fill_(torch.arange(k.shape[2], device=q.device) > row.unsqueeze(-1), -torch.inf)
    return scores


def _exponentials(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(scores - top), in their place, with top and sum of every row [..., 1]; zeros for a row without a key."""
    # Without keys there is no maximum; Inf stays out of Inf - Inf.
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros((*scores.shape[:-1], 1))
    top.masked_fill_(top == -torch.inf, 0)
    weights = scores.sub_(top).exp_()
    return weights, top, weights.sum(-1, keepdim=True)


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@_without_autocast
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, L, Dv] in q's dtype, and log-sum-exp of the scores [B, H, L], +Inf for a row without a key."""
    wide = _wide(q)
    batch, heads, length, _ = q.shape
    out = q.new_empty((batch, length, heads, v.shape[3])).transpose(1, 2)
    logsumexp = q.new_empty(q.shape[:3], dtype=wide)
    mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    for part in _parts(q, k):
        k_part, v_part = k[part.keys].to(wide), v[part.keys].to(wide)
        scores = _scores(q[part.queries].to(wide), k_part, part, mask, causal, scale)
        weights, top, total = _exponentials(scores)
        empty = total == 0
        rows = (_by_key_head(weights, k_part.shape[1]) @ v_part).reshape(*scores.shape[:3], v.shape[3])
        out[part.queries] = (rows / total.masked_fill(empty, 1)).to(out.dtype)
        logsumexp[part.queries] = (top + total.log()).masked_fill(empty, torch.inf).squeeze(-1)
    return out, logsumexp


@_without_autocast
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
    of_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, and of an additive mask where `of_mask`, in their dtypes; parts add up in their order."""
    wide = _wide(q)
    grad_q = q.new_empty(q.shape)
    grad_k = torch.zeros(k.shape, dtype=wide, device=k.device)
    grad_v = torch.zeros(v.shape, dtype=wide, device=v.device)
    whole_mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    grad_mask = torch.zeros(mask.shape, dtype=wide, device=mask.device) if of_mask and mask is not None else None
    for part in _parts(q, k):
        q_part, g = q[part.queries].to(wide), grad_out[part.queries].to(wide)
        k_part, v_part = k[part.keys].to(wide), v[part.keys].to(wide)
        key_heads = k_part.shape[1]
        # A part has whole rows, whose sums are more exact than what a kernel that sees a row in pieces takes for them:
        # exp(scores - logsumexp) and the product of the result with its gradient.
        weights, _, total = _exponentials(_scores(q_part, k_part, part, whole_mask, causal, scale))
        weights /= total.masked_fill_(total == 0, 1)
        by_head = _by_key_head(g, key_heads)
        grad_v[part.keys] += _by_key_head(weights, key_heads).transpose(-1, -2) @ by_head
        inner = (by_head @ v_part.transpose(-1, -2)).reshape(weights.shape)
        inner -= (weights * inner).sum(-1, keepdim=True)
        grad_scores = weights.mul_(inner)
        if grad_mask is not None:
            rows = tuple(s if n > 1 else slice(0, 1) for s, n in zip(part.queries, grad_mask.shape, strict=False))
            grad_mask[rows] += grad_scores.sum_to_size(grad_mask[rows].shape)
        of_scores = _by_key_head(grad_scores, key_heads)
        grad_q[part.queries] = ((of_scores @ k_part) * scale).reshape(q_part.shape).to(q.dtype)
        grad_k[part.keys] += of_scores.transpose(-1, -2) @ _by_key_head(q_part * scale, key_heads)
    return (
        grad_q,
        grad_k.to(k.dtype),
        grad_v.to(v.dtype),
        None if grad_mask is None or mask is None else grad_mask.to(mask.dtype),
    )
