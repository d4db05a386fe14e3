"""A gated branch added to the residual stream."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqkernels import reference
from vqkernels.ops import _backend
from vqkernels.ops._checks import check_choice
from vqkernels.ops._eager_modulation import gate_residual_eager
from vqkernels.ops._modulation import (
    NUMERICS,
    check_branch,
    check_modulation,
    check_rows,
    empty_gradient,
    gradient_layout,
    gradient_of,
    kernel_modulation,
    of_rows,
    promoted,
    rows,
)


def _shape_rule(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=promoted((x, branch, gate)))


def _backward_shape_rule(grad_residual: Tensor, branch: Tensor, gate: Tensor, layout: int) -> tuple[Tensor, Tensor]:
    return branch.new_empty(branch.shape), empty_gradient(branch, layout, gate.dtype)


_backend.define(
    "gate_residual(Tensor x, Tensor branch, Tensor gate) -> Tensor residual", _shape_rule, cuda_kernels=False
)
_backend.define(
    "gate_residual_backward(Tensor grad_residual, Tensor branch, Tensor gate, int layout) "
    "-> (Tensor grad_branch, Tensor grad_gate)",
    _backward_shape_rule,
    cuda_kernels=False,
)


def gate_residual_gradients(
    grad: Tensor, branch: Tensor, gate: Tensor, of_gate: bool, backend: str | None
) -> tuple[Tensor, Tensor | None]:
    """Those of branch and, if it is wanted, gate, from that of the residual."""
    layout = gradient_layout(gate, branch, of_gate)
    kernel = _backend.implementation("gate_residual_backward", backend)
    grad_branch, grad_gate = kernel(rows(grad), rows(branch), kernel_modulation(gate, branch), layout)
    return grad_branch.reshape(branch.shape), gradient_of(gate, grad_gate, layout)


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, gate: Tensor, backend: str | None) -> Tensor:
        ctx.save_for_backward(branch, gate)
        ctx.options = (x.dtype, backend)
        kernel = _backend.implementation("gate_residual", backend)
        return of_rows(kernel(rows(x), rows(branch), kernel_modulation(gate, x)), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate = ctx.saved_tensors
        dtype, backend = ctx.options
        grad_branch = grad_gate = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_branch, grad_gate = gate_residual_gradients(grad, branch, gate, ctx.needs_input_grad[2], backend)
        return grad.to(dtype), grad_branch, grad_gate, None


def gate_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None = None, *, numerics: str = "fp32", backend: str | None = None
) -> Tensor:
    """Adds a gated branch to the residual stream, x + gate * branch, in one pass each way.

    Args:
        x: [B, ..., D], D at least 1; float32, float64, bfloat16 or float16.
        branch: the shape of x, any of these dtypes.
        gate: [D], [B, D], [B, 1, ..., D] or the shape of x, any of these dtypes and any strides; None: 1. Two
            dimensions are always [B, D], one row for each batch item of x.
        numerics: "fp32" computes in float32 (float64 where an argument is float64) and rounds once, "eager" rounds the
            product too, as the expression does: values and gradients equal it bit for bit on the same device.
        backend: None (what suits the device), "native", "triton" or "reference".

    Returns:
        The shape of x, in the dtype that the arguments promote to. The gradient of the gate is a sum in a fixed order.

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, devices, numerics or backend do not fit.
        RuntimeError: the backend asked for cannot serve the call.
    """
    check_rows("x", x)
    check_branch(x, branch)
    check_modulation("gate", gate, x)
    check_choice("numerics", numerics, NUMERICS)
    backend = _backend.resolve(backend, x, cuda_kernels=False)
    if backend == "reference":
        return reference.gate_residual(x, branch, gate, numerics=numerics)
    if gate is None or numerics == "eager":
        return gate_residual_eager(x, branch, gate)
    return _GateResidual.apply(x, branch, gate, backend)
