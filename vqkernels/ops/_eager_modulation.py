"""The norm chain in the roundings of its eager expressions: bit for bit their values and gradients (numerics="eager").

Norms and sums are torch's own calls, in the order in which autograd makes them; one operation holds the whole chain, so
that a compiler cannot fuse parts of it into something that rounds differently.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqkernels.ops import _backend
from vqkernels.ops._modulation import used_first
from vqkernels.reference.norm_modulate import norm_dtype, over_rows, result_dtype


def _define(schema: str, kernel: Callable[..., Any], shape_rule: Callable[..., Any]) -> None:
    name = schema.split("(")[0]
    _backend.library.define(schema)
    _backend.library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vqkernels::{name}", shape_rule, lib=_backend.library)


def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, and what its gradient needs: mean and rstd; the mean of "rms" is empty."""
    if norm == "layer":
        return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.to(_wide(x.dtype))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    n = (wide * rstd).to(x.dtype)
    n = n if weight is None else n * weight
    return n if bias is None else n + bias, rstd.new_empty(0), rstd


def _normalize_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    affine: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, of x once more under "rms", of weight and bias."""
    if norm == "layer":
        mask = [True, affine and weight is not None, affine and bias is not None]
        grads = torch.ops.aten.native_layer_norm_backward(grad, x, x.shape[-1:], mean, rstd, weight, bias, mask)
        return grads[0], None, grads[1], grads[2]
    grad_weight = grad_bias = None
    wide = x.to(rstd.dtype)
    if bias is not None:
        grad_bias = grad.sum_to_size(bias.shape).to(bias.dtype) if affine else None
        grad = grad.to(x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype))
    if weight is not None:
        normalized = (wide * rstd).to(x.dtype)
        grad_weight = (grad * normalized).sum_to_size(weight.shape).to(weight.dtype) if affine else None
        grad = (grad * weight).to(x.dtype)
    grad = grad.to(rstd.dtype)
    grad_rstd = (grad * wide).sum_to_size(rstd.shape)
    grad_mean = -0.5 * grad_rstd * rstd.pow(3)
    through_mean = grad_mean.expand(x.shape) / x.shape[-1] * (2 * wide)
    parts = (grad * rstd).to(x.dtype), through_mean.to(x.dtype)
    # Autograd meets the product first where x needs no cast, and otherwise the cast that was made last.
    first, second = parts if x.dtype == rstd.dtype else parts[::-1]
    return first, second, grad_weight, grad_bias


def _norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    shift2: Tensor | None,
    scale2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    two: bool,
) -> tuple[Tensor, Tensor]:
    n = _normalize(x, weight, bias, norm, eps)[0]
    outputs = []
    for a, b in ((shift, scale), (shift2, scale2))[: 1 + two]:
        y = n if b is None else n * (1 + b)
        y = y if a is None else y + a
        outputs.append(y.clone() if y is n else y)  # results may not share memory
    return outputs[0], outputs[1] if two else x.new_empty(0)


def _norm_modulate_backward(
    grad_residual: Tensor | None,
    grad_y: Tensor,
    grad_y2: Tensor | None,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    shift2: Tensor | None,
    scale2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    n, mean, rstd = _normalize(x, weight, bias, norm, eps)
    n_dtype = x.dtype if norm == "layer" else result_dtype(x, weight, bias)
    grad_n = None
    gradients: list[Tensor] = []
    pairs = [(grad_y, shift, scale), *([] if grad_y2 is None else [(grad_y2, shift2, scale2)])]
    for i, (grad, a, b) in enumerate(pairs):
        of_shift = of_scale = x.new_empty(0)
        if a is not None and wanted[2 * i]:
            of_shift = grad.sum_to_size(a.shape).to(a.dtype)
        if b is not None:
            grad = grad.to(torch.promote_types(n_dtype, b.dtype))
            if wanted[2 * i + 1]:
                of_scale = (grad * n).sum_to_size(b.shape).to(b.dtype)
            grad = grad * (1 + b)
        grad = grad.to(n_dtype)
        grad_n = grad if grad_n is None else grad_n + grad
        gradients += [_own(of_shift, grad_y, grad_y2), of_scale]
    gradients += [x.new_empty(0) for _ in range(4 - len(gradients))]
    assert grad_n is not None
    of_x, of_x_again, *affine = _normalize_backward(grad_n, x, weight, bias, mean, rstd, norm, wanted[4])
    if grad_residual is not None:
        of_x = grad_residual + of_x.to(grad_residual.dtype)
        of_x, of_x_again = (of_x if of_x_again is None else of_x + of_x_again), None
    return of_x, *_or_empty(x, of_x_again), *gradients, *_or_empty(x, *affine)


def _or_empty(x: Tensor, *gradients: Tensor | None) -> list[Tensor]:
    return [x.new_empty(0) if grad is None else grad for grad in gradients]


def _own(result: Tensor, *inputs: Tensor | None) -> Tensor:
    """A result in memory of its own: a sum over nothing is its argument."""
    shared = any(t is not None and result.data_ptr() == t.data_ptr() for t in inputs)
    return result.clone() if shared and result.numel() else result


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _backward_shape_rule(
    grad_residual: Tensor | None,
    grad_y: Tensor,
    grad_y2: Tensor | None,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    shift2: Tensor | None,
    scale2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    empty = x.new_empty(0)
    return (
        torch.empty_like(x, dtype=x.dtype if grad_residual is None else grad_residual.dtype),
        torch.empty_like(x) if norm == "rms" and grad_residual is None else empty,
        *(
            torch.empty_like(value) if value is not None and want else empty.clone()
            for value, want in zip((shift, scale, shift2, scale2), wanted[:4], strict=True)
        ),
        *(torch.empty_like(value) if value is not None and wanted[4] else empty.clone() for value in (weight, bias)),
    )


_define(
    "norm_modulate_eager(Tensor x, Tensor? shift, Tensor? scale, Tensor? shift2, Tensor? scale2, Tensor? weight, "
    "Tensor? bias, str norm, float eps, bool two) -> (Tensor y, Tensor y2)",
    _norm_modulate,
    _norm_modulate,
)
_define(
    "norm_modulate_eager_backward(Tensor? grad_residual, Tensor grad_y, Tensor? grad_y2, Tensor x, Tensor? shift, "
    "Tensor? scale, Tensor? shift2, Tensor? scale2, Tensor? weight, Tensor? bias, str norm, float eps, bool[] wanted) "
    "-> (Tensor grad_x, Tensor grad_x_again, Tensor grad_shift, Tensor grad_scale, Tensor grad_shift2, "
    "Tensor grad_scale2, Tensor grad_weight, Tensor grad_bias)",
    _norm_modulate_backward,
    _backward_shape_rule,
)


def _gate_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x + gate * branch


def _gate_residual_backward(grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.to(torch.promote_types(branch.dtype, gate.dtype))
    return (grad * gate).to(branch.dtype), (grad * branch).sum_to_size(gate.shape).to(gate.dtype)


_define("gate_residual_eager(Tensor x, Tensor branch, Tensor gate) -> Tensor residual", _gate_residual, _gate_residual)
_define(
    "gate_residual_eager_backward(Tensor grad_residual, Tensor branch, Tensor gate) "
    "-> (Tensor grad_branch, Tensor grad_gate)",
    _gate_residual_backward,
    _gate_residual_backward,
)


def _gradients(
    grad_residual: Tensor | None,
    grads: Sequence[Tensor | None],
    x: Tensor,
    modulations: Sequence[Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    needed: Sequence[bool],
) -> list[Any]:
    """Of x, of x once more (None unless "rms" leaves the two apart), shift, scale, shift2, scale2, weight and bias.

    `grads` are those of one result or two, at least one is given; to autograd a result without one does not exist.
    `needed` is that of the last six.
    """
    grad_y, grad_y2 = used_first([*grads, *[None] * (2 - len(grads))], grads)
    values = used_first([None if value is None else over_rows(value, x) for value in modulations], grads)
    needs = used_first(needed[:4], grads)
    wanted = needs if grad_y2 is not None else [*needs[:2], False, False]
    grad_x, again, *gradients, grad_weight, grad_bias = torch.ops.vqkernels.norm_modulate_eager_backward(
        grad_residual, grad_y, grad_y2, x, *values, weight, bias, norm, eps, [*wanted, needed[4] or needed[5]]
    )
    of_modulations = [
        gradient.reshape(value.shape) if value is not None and want else None
        for value, gradient, want in zip(used_first(modulations, grads), gradients, wanted, strict=True)
    ]
    return [
        grad_x,
        again if norm == "rms" and grad_residual is None else None,
        *used_first(of_modulations, grads),
        grad_weight if needed[4] else None,
        grad_bias if needed[5] else None,
    ]


class _NormModulateEager(torch.autograd.Function):
    """Takes x twice for "rms": it is read twice, and autograd adds the two gradients to others of x one by one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_again: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        shift2: Tensor | None,
        scale2: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: str,
        eps: float,
        two: bool,
    ) -> Any:
        values = [None if value is None else over_rows(value, x) for value in (shift, scale, shift2, scale2)]
        y, y2 = torch.ops.vqkernels.norm_modulate_eager(x, *values, weight, bias, norm, eps, two)
        ctx.save_for_backward(x, shift, scale, shift2, scale2, weight, bias)
        ctx.options = (norm, eps)
        ctx.set_materialize_grads(False)
        return (y, y2) if two else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * 11
        x, *modulations, weight, bias = ctx.saved_tensors
        norm, eps = ctx.options
        grad_x, grad_x_again, *others = _gradients(
            None, grads, x, modulations, weight, bias, norm, eps, ctx.needs_input_grad[2:8]
        )
        return grad_x, grad_x_again, *others, *[None] * 3


class _GateResidualEager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(branch, gate)
        ctx.x_dtype = x.dtype
        return torch.ops.vqkernels.gate_residual_eager(x, branch, over_rows(gate, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate = ctx.saved_tensors
        kernel = torch.ops.vqkernels.gate_residual_eager_backward
        grad_branch, grad_gate = kernel(grad, branch, over_rows(gate, branch))
        return grad.to(ctx.x_dtype), grad_branch, grad_gate.reshape(gate.shape)


class _GateResidualNormModulateEager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        shift2: Tensor | None,
        scale2: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: str,
        eps: float,
        two: bool,
    ) -> tuple[Tensor, ...]:
        if gate is None:
            residual = x + branch
        else:
            residual = torch.ops.vqkernels.gate_residual_eager(x, branch, over_rows(gate, x))
        normalized = residual.to(norm_dtype(residual, norm))
        values = [None if value is None else over_rows(value, x) for value in (shift, scale, shift2, scale2)]
        y, y2 = torch.ops.vqkernels.norm_modulate_eager(normalized, *values, weight, bias, norm, eps, two)
        kept = None if gate is None else branch
        ctx.save_for_backward(residual, kept, gate, shift, scale, shift2, scale2, weight, bias)
        ctx.options = (norm, eps, normalized.dtype, x.dtype, branch.dtype)
        ctx.set_materialize_grads(False)
        return (residual, y, y2) if two else (residual, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        residual, branch, gate, *modulations, weight, bias = ctx.saved_tensors
        norm, eps, dtype, x_dtype, branch_dtype = ctx.options
        others: list[Tensor | None] = [None] * 6
        if any(of_result is not None for of_result in grads):
            grad, again, *others = _gradients(
                grad, grads, residual.to(dtype), modulations, weight, bias, norm, eps, ctx.needs_input_grad[3:9]
            )
            grad = (grad if again is None else grad + again).to(residual.dtype)
        if grad is None:
            return (None,) * 12
        grad_branch, grad_gate = grad, None
        if gate is not None:
            kernel = torch.ops.vqkernels.gate_residual_eager_backward
            grad_branch, grad_gate = kernel(grad, branch, over_rows(gate, branch))
            grad_gate = grad_gate.reshape(gate.shape)
        return grad.to(x_dtype), grad_branch.to(branch_dtype), grad_gate, *others, *[None] * 3


def norm_modulate_eager(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    second: tuple[Tensor | None, Tensor | None] | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Any:
    """`norm_modulate` of checked arguments, x in the dtype in which autocast wants the norm."""
    shift2, scale2 = (None, None) if second is None else second
    two = second is not None
    x_again = x.view_as(x) if norm == "rms" else None
    return _NormModulateEager.apply(x, x_again, shift, scale, shift2, scale2, weight, bias, norm, float(eps), two)


def gate_residual_eager(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """`gate_residual` of checked arguments."""
    return x + branch if gate is None else _GateResidualEager.apply(x, branch, gate)


def gate_residual_norm_modulate_eager(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    second: tuple[Tensor | None, Tensor | None] | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """`gate_residual_norm_modulate` of checked arguments."""
    shift2, scale2 = (None, None) if second is None else second
    two = second is not None
    return _GateResidualNormModulateEager.apply(
        x, branch, gate, shift, scale, shift2, scale2, weight, bias, norm, float(eps), two
    )
