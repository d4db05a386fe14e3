"""Normalisation and rotation of queries and keys in one pass, and their gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqkernels import reference
from vqkernels.ops import _backend
from vqkernels.ops._checks import wide_type
from vqkernels.ops._qk_norm_rope_checks import NORMS, check_arguments
from vqkernels.reference.qk_norm_rope import norm_rope, normalize


def _shape_rule(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    factor: Tensor | None,
    norm: str,
    across_heads: bool,
    eps: float,
    layout: str,
) -> Tensor:
    return torch.empty_like(x)


def _backward_shape_rule(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    across_heads: bool,
    eps: float,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight, grad_bias = (x.new_empty((0, 0) if t is None else t.shape, dtype=wide_type(x)) for t in (weight, bias))
    return torch.empty_like(x), grad_weight, grad_bias


def _eager_shape_rule(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    across_heads: bool,
    eps: float,
    layout: str,
    backend: str | None,
) -> Tensor:
    dtype = norm_rope(x, weight, bias, cos, sin, _NAMES[norm], across_heads, eps, layout).dtype
    return torch.empty_like(x, dtype=dtype)


def _eager_backward_shape_rule(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    across_heads: bool,
    eps: float,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight, grad_bias = (x.new_empty(0) if t is None else torch.empty_like(t) for t in (weight, bias))
    return torch.empty_like(x), grad_weight, grad_bias


# x [B, L, H, D]; weight and bias [1 or H, D], cos and sin [1 or B, L, R / 2], factor [B, L, H or 1, 1], all of the type
# of the arithmetic. factor: what a torch expression normalises by, reciprocal root mean squares or l2 norms; roundings
# are then those of torch's expression.
_backend.define(
    "qk_norm_rope(Tensor x, Tensor? weight, Tensor? bias, Tensor? cos, Tensor? sin, Tensor? factor, str norm, "
    "bool across_heads, float eps, str layout) -> Tensor",
    _shape_rule,
    cuda_kernels=False,
)
_backend.define(
    "qk_norm_rope_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? cos, Tensor? sin, str norm, "
    "bool across_heads, float eps, str layout) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _backward_shape_rule,
    cuda_kernels=False,
)

_NAMES = {"none": None} | {name: name for name in NORMS}


def _eager(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    across_heads: bool,
    eps: float,
    layout: str,
    backend: str | None,
) -> Tensor:
    """Sums over heads and dimensions by torch itself; the elementwise rest is one pass, rounded as torch rounds."""
    run = _backend.implementation("qk_norm_rope", backend)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        wide = wide_type(x)
        fused = norm in ("rms", "l2") and (weight is None or weight.dtype == x.dtype)
        if not fused:
            normed = normalize(x, weight, bias, _NAMES[norm], across_heads, eps)
            out = torch.empty_like(x, dtype=normed.dtype)
            if cos is None:
                return out.copy_(normed)
            return out.copy_(run(normed, None, None, *_tables(normed, cos, sin), None, "none", False, eps, layout))
        rows = x.flatten(2) if across_heads else x
        if norm == "rms":
            factor = torch.rsqrt(rows.to(wide).pow(2).mean(-1, keepdim=True) + eps)
        else:
            factor = rows.norm(2, -1, keepdim=True).clamp_min(eps).to(wide)
        factor = factor.unsqueeze(-1) if across_heads else factor
        weight = None if weight is None else _matrix(weight.to(wide), *x.shape[2:])
        return run(x, weight, None, *_tables(x, cos, sin), factor, norm, across_heads, eps, layout)


@contextmanager
def _autograd_again() -> Iterator[None]:
    """Autograd inside of an operation, also where a mode such as FlopCounterMode has dispatched below it."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def _eager_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    across_heads: bool,
    eps: float,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """By autograd, of the plain expression."""
    with _autograd_again(), torch.autocast(x.device.type, enabled=False):
        leaf = x.detach().requires_grad_()
        parameters = [None if t is None else t.detach().requires_grad_() for t in (weight, bias)]
        out = norm_rope(leaf, parameters[0], parameters[1], cos, sin, _NAMES[norm], across_heads, eps, layout)
        given = [t for t in parameters if t is not None]
        grad_x, *sums = torch.autograd.grad(out, [leaf, *given], grad)
    remaining = iter(sums)
    grad_weight, grad_bias = (x.new_empty(0) if t is None else next(remaining) for t in parameters)
    return torch.empty_like(x).copy_(grad_x), grad_weight, grad_bias


# Opaque to torch.compile, which would otherwise fuse and reorder what has to be torch's own.
for _schema, _kernel, _rule in (
    (
        "qk_norm_rope_eager(Tensor x, Tensor? weight, Tensor? bias, Tensor? cos, Tensor? sin, str norm, "
        "bool across_heads, float eps, str layout, str? backend) -> Tensor",
        _eager,
        _eager_shape_rule,
    ),
    (
        "qk_norm_rope_eager_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? cos, Tensor? sin, "
        "str norm, bool across_heads, float eps, str layout) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        _eager_backward,
        _eager_backward_shape_rule,
    ),
):
    _name = _schema.split("(")[0]
    _backend.library.define(_schema)
    _backend.library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vqkernels::{_name}", _rule, lib=_backend.library)


class _QkNormRope(torch.autograd.Function):
    """Takes parameters and tables as its operation does: `eager` those of the plain expression, else the kernels'."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        options: tuple[str, bool, float, str],
        backend: str | None,
        eager: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, cos, sin)
        ctx.options, ctx.backend, ctx.eager = options, backend, eager
        if eager:
            return torch.ops.vqkernels.qk_norm_rope_eager(x, weight, bias, cos, sin, *options, backend)
        return _backend.implementation("qk_norm_rope", backend)(x, weight, bias, cos, sin, None, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, cos, sin = ctx.saved_tensors
        eager = torch.ops.vqkernels.qk_norm_rope_eager_backward
        run = eager if ctx.eager else _backend.implementation("qk_norm_rope_backward", ctx.backend)
        grad_x, grad_weight, grad_bias = run(grad, x, weight, bias, cos, sin, *ctx.options)
        return grad_x, None if weight is None else grad_weight, None if bias is None else grad_bias, *[None] * 5


def _matrix(parameter: Tensor, heads: int, dim: int) -> Tensor:
    """A parameter of any accepted shape as [1, D] or [H, D]."""
    if parameter.ndim == 1 and parameter.shape[0] == heads * dim:
        return parameter.reshape(heads, dim)
    return parameter.expand(heads if parameter.ndim == 2 and parameter.shape[0] != 1 else 1, dim)


def _tables(x: Tensor, *tables: Tensor | None) -> list[Tensor | None]:
    """The tables as [1 or B, L, R / 2] in the type that x is computed in."""
    wide = wide_type(x)
    return [None if t is None else (t if t.ndim == 3 else t.unsqueeze(0)).to(wide) for t in tables]


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Normalises queries and keys and rotates them by their positions, in one pass.

        n = x / sqrt(mean(x^2) + eps)                    norm "rms" (arXiv 1910.07467)
        n = x / max(|x|, eps)                            norm "l2"
        n = (x - mean(x)) / sqrt(var(x) + eps)           norm "layer" (arXiv 1607.06450)
        y = n weight + bias
        (y_i, y_j) <- (y_i cos - y_j sin, y_j cos + y_i sin)    (arXiv 2104.09864)

    over the D dimensions of a head, or over all heads of a position. Computed in float32 (float64 for float64).
    numerics="fp32" rounds once, at the end. The gradients of x, weight and bias are computed from the inputs, in
    float32 too; sums over positions are made in a fixed order, so that they are bitwise the same from run to run and
    for any number of threads.

    numerics="eager" gives the values and gradients of the plain expression bit for bit on the same device. With
    `wide` for float32 (float64 for float64), every operation rounds to the dtype of its result:

        rms:    n = x * rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps), a wide tensor;
                weight in half precision: n.to(weight.dtype) * weight; another weight: n * weight; none: n.to(x.dtype)
        l2:     F.normalize(x, dim=-1, eps=eps), then * weight
        layer:  F.layer_norm(x, (D,), weight, bias, eps); parameters that are not [D] multiply and add afterwards
        rotation:  (y.to(wide) * cos + turned.to(wide) * sin).to(y.dtype), turned having -y_j at i and y_i at j

    on x.flatten(2) across heads, as `RMSNorm` and `apply_rotary_emb` of diffusers do. In float32 on CPU
    `torch.nn.RMSNorm` is the same expression; elsewhere it rounds after the weight.

    Args:
        q: [B, L, H, D], H and D at least 1; float32, float64, bfloat16 or float16. Any strides, such as those of a
            slice of packed q, k and v or of a transposed [B, H, L, D]; a last one other than 1 costs a copy.
        k: [B, L, Hk, D] of the same dtype, or None; without cos its length may differ from that of q.
        cos: [L, R / 2] or [B, L, R / 2], one value a pair, R at most D; None: no rotation. Of a table that holds
            every value twice take `table[:, ::2]` (interleaved) or `table[:, :R // 2]` (half).
        sin: like cos.
        norm: "rms", "layer", "l2" or None.
        across_heads: whether the norm is over all heads of a position together.
        q_weight: [D], [H, D], [H, 1] (a learned scale of a head) or []; across heads also [H * D].
        k_weight: like q_weight, with Hk.
        q_bias: like q_weight; norm "layer" only.
        k_bias: like q_bias, with Hk.
        eps: at least 0.
        layout: "interleaved" pairs dimensions (2 i, 2 i + 1), "half" (i, i + R / 2), of the first R.
        numerics: "fp32" or "eager".
        backend: None (what suits the device), "native", "triton" or "reference".

    Returns:
        q and k, normalised and rotated, in their shapes, dtypes and orders of strides, None for None. The dtype of
        numerics="eager" is that of the expression: a float32 weight of an input in half precision makes it float32.
        cos and sin get no gradient.

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, devices, norm, layout, numerics, parameters or backend do not fit.
        RuntimeError: the backend asked for cannot serve the call.
    """
    parameters = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    check_arguments(q, k, cos, sin, norm, across_heads, parameters, eps, layout, numerics)
    backend = _backend.resolve(backend, q, cuda_kernels=False)
    if backend == "reference":
        return reference.qk_norm_rope(
            q,
            k,
            cos,
            sin,
            norm=norm,
            across_heads=across_heads,
            **parameters,
            eps=eps,
            layout=layout,
            numerics=numerics,
        )
    options = (norm or "none", across_heads, float(eps), layout)
    eager = numerics == "eager"
    if not eager:
        cos, sin = _tables(q, cos, sin)

    def apply(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if not eager:
            wide = wide_type(x)
            weight, bias = (None if t is None else _matrix(t.to(wide), *x.shape[2:]) for t in (weight, bias))
        return _QkNormRope.apply(x, weight, bias, cos, sin, options, backend, eager)

    return apply(q, q_weight, q_bias), None if k is None else apply(k, k_weight, k_bias)
