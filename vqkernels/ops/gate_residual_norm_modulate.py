"""A gated branch added to the residual stream and the modulated norm of the sum, in one pass in either direction."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqkernels import reference
from vqkernels.ops import _backend
from vqkernels.ops._eager_modulation import gate_residual_norm_modulate_eager
from vqkernels.ops._modulation import (
    Second,
    backward_arguments,
    check_branch,
    check_modulation,
    check_norm,
    check_rows,
    check_second,
    empty_gradient,
    gradient_layout,
    gradient_of,
    kernel_modulation,
    kernel_modulations,
    modulation_gradients,
    of_rows,
    promoted,
    rows,
    wide_of,
)
from vqkernels.ops.gate_residual import gate_residual_gradients
from vqkernels.reference.norm_modulate import norm_dtype


def _shape_rule(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    residual = x.new_empty(x.shape, dtype=promoted((x, branch, gate)))
    dtype = promoted((residual, shift, scale, shift2, scale2))
    statistics = x.new_empty(x.shape[:2], dtype=wide_of(dtype))
    return (
        residual,
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape if two else 0, dtype=dtype),
        statistics if norm == "layer" else statistics.new_empty(0),
        torch.empty_like(statistics),
    )


def _backward_shape_rule(
    grad_residual: Tensor | None,
    grad_y: Tensor,
    grad_y2: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    scale2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    layouts: list[int],
    affine: bool,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if branch is None else branch.new_empty(branch.shape),
        empty_gradient(x, layouts[0], x.dtype if gate is None else gate.dtype),
        *(empty_gradient(x, layout, grad_y.dtype) for layout in layouts[1:]),
        *(p.new_empty(p.shape if affine else 0) if p is not None else x.new_empty(0) for p in (weight, bias)),
    )


_backend.define(
    "gate_residual_norm_modulate(Tensor x, Tensor branch, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? shift2, "
    "Tensor? scale2, Tensor? weight, Tensor? bias, str norm, float eps, bool two) "
    "-> (Tensor residual, Tensor y, Tensor y2, Tensor mean, Tensor rstd)",
    _shape_rule,
    cuda_kernels=False,
)
_backend.define(
    "gate_residual_norm_modulate_backward(Tensor? grad_residual, Tensor grad_y, Tensor? grad_y2, Tensor x, "
    "Tensor? branch, Tensor? gate, Tensor? scale, Tensor? scale2, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor rstd, str norm, int[] layouts, bool affine) -> (Tensor grad_x, Tensor grad_branch, Tensor grad_gate, "
    "Tensor grad_shift, Tensor grad_scale, Tensor grad_shift2, Tensor grad_scale2, Tensor grad_weight, "
    "Tensor grad_bias)",
    _backward_shape_rule,
    cuda_kernels=False,
)


def _forward(
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
    dtype: torch.dtype,
    backend: str | None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The results of `gate_residual_norm_modulate`, mean and rstd."""
    unmodulated = promoted((x, branch, gate))
    modulations = kernel_modulations((shift, scale, shift2, scale2), x, dtype, unmodulated)
    kernel = _backend.implementation("gate_residual_norm_modulate", backend)
    residual, y, y2, mean, rstd = kernel(
        rows(x), rows(branch), kernel_modulation(gate, x), *modulations, weight, bias, norm, eps, two
    )
    results = (residual, y, y2) if two else (residual, y)
    return tuple(of_rows(result, x) for result in results), mean, rstd


class _GateResidualNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        results, mean, rstd = _forward(*arguments)
        x, branch, gate = arguments[:3]
        norm, _, _, dtype, backend = arguments[9:]
        # Without a gate the gradient needs the sum alone, which lives on as the residual.
        inputs = (results[0], None) if gate is None else (x, branch)
        ctx.save_for_backward(*inputs, *arguments[2:9], mean, rstd)
        ctx.options = (norm, dtype, backend, x.dtype, branch.dtype)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_residual: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, branch, gate, *modulations, weight, bias, mean, rstd = ctx.saved_tensors
        norm, dtype, backend, x_dtype, branch_dtype = ctx.options
        needed = ctx.needs_input_grad
        gate_layout = gradient_layout(gate, x, needed[2])
        if all(grad is None for grad in grads):
            # The norm is not in use: what it does with a row that is not finite must not show.
            if grad_residual is None:
                return (None,) * 14
            grad_branch, grad_gate = grad_residual.to(branch_dtype), None
            if gate is not None:
                grad_branch, grad_gate = gate_residual_gradients(grad_residual, branch, gate, needed[2], backend)
            return grad_residual.to(x_dtype), grad_branch, grad_gate, *[None] * 11
        of_results, scales, layouts = backward_arguments(grads, modulations, needed[3:7], x, dtype)
        kernel = _backend.implementation("gate_residual_norm_modulate_backward", backend)
        grad_x, grad_branch, grad_gate, *gradients, grad_weight, grad_bias = kernel(
            None if grad_residual is None else rows(grad_residual),
            *of_results,
            rows(x),
            None if branch is None else rows(branch),
            kernel_modulation(gate, x),
            *scales,
            weight,
            bias,
            mean,
            rstd,
            norm,
            [gate_layout, *layouts],
            needed[7] or needed[8],
        )
        grad_branch = grad_x if branch is None else grad_branch
        return (
            of_rows(grad_x, x).to(x_dtype),
            of_rows(grad_branch, x).to(branch_dtype),
            gradient_of(gate, grad_gate, gate_layout),
            *modulation_gradients(grads, modulations, gradients, layouts),
            grad_weight if needed[7] else None,
            grad_bias if needed[8] else None,
            *[None] * 5,
        )


def gate_residual_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    second: Second = None,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    numerics: str = "fp32",
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Adds a gated branch to the residual stream and gives the modulated norm of the sum, in one pass each way.

        residual = x + gate branch,   n = normalized(residual) weight + bias,   y = n (1 + scale) + shift

    The arguments are those of `gate_residual` and `norm_modulate`, and so is the result; under `numerics="fp32"` the
    norm is that of the sum before it is rounded to the dtype of the residual. Under torch.compile a result that is not
    in use has a gradient of 0 instead of none, which makes gradients NaN where the norm or its scale is not finite.

    Args:
        x: [B, ..., D], D at least 1; float32, float64, bfloat16 or float16.
        branch: the shape of x, any of these dtypes.
        gate: [D], [B, D], [B, 1, ..., D] or the shape of x, any of these dtypes and any strides; None: 1. Two
            dimensions are always [B, D], one row for each batch item of x.
        shift: the same shapes; None: 0.
        scale: the same shapes; None: 0.
        second: (shift, scale) of a second result that modulates the same norm; either may be None.
        norm: "layer" or "rms".
        weight: [D], any of these dtypes; None: 1.
        bias: [D]; None: 0.
        eps: added to the variance, at least 0.
        numerics: "fp32" or "eager", see `norm_modulate`.
        backend: None (what suits the device), "native", "triton" or "reference".

    Returns:
        residual: the shape of x, in the dtype that x, branch and gate promote to.
        y: the same, in the dtype that residual, shift and scale promote to.
        second y: only with `second`.

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, devices, norm, eps, numerics or backend do not fit.
        RuntimeError: the backend asked for cannot serve the call.
    """
    check_rows("x", x)
    check_branch(x, branch)
    check_modulation("gate", gate, x)
    check_modulation("shift", shift, x)
    check_modulation("scale", scale, x)
    check_second(second, x)
    check_norm(x, norm, weight, bias, eps, numerics)
    backend = _backend.resolve(backend, x, cuda_kernels=False)
    if backend == "reference":
        return reference.gate_residual_norm_modulate(
            x,
            branch,
            gate,
            shift,
            scale,
            second=second,
            norm=norm,
            weight=weight,
            bias=bias,
            eps=eps,
            numerics=numerics,
        )
    if numerics == "eager":
        return gate_residual_norm_modulate_eager(x, branch, gate, shift, scale, second, norm, weight, bias, eps)
    shift2, scale2 = (None, None) if second is None else second
    residual_dtype = promoted((x, branch, gate))
    dtype = promoted((x, branch, gate, shift, scale, shift2, scale2))
    dtype = torch.promote_types(dtype, norm_dtype(x.new_empty(0, dtype=residual_dtype), norm))
    two = second is not None
    options = (norm, float(eps), two, dtype, backend)
    arguments = (x, branch, gate, shift, scale, shift2, scale2, weight, bias, *options)
    return _GateResidualNormModulate.apply(*arguments) if torch.is_grad_enabled() else _forward(*arguments)[0]
