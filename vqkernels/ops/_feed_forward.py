"""What the operations of feed-forward layers share: checks, shapes and the rules of gated activations.

Kernels see x as [B, L, D].
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqkernels.ops import _backend
from vqkernels.ops._checks import check_choice
from vqkernels.ops._modulation import promoted, rows
from vqkernels.reference._checks import FLOAT_TYPES, check_device, check_shape, check_tensor

APPROXIMATIONS = ("tanh", "none")
GATES = ("first", "second")


def check_biased(x: Tensor, bias: Tensor | None) -> None:
    check_tensor("x", x, FLOAT_TYPES)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape [..., D] with D at least 1, got {list(x.shape)}")
    if bias is not None:
        check_tensor("bias", bias, FLOAT_TYPES)
        check_shape("bias", bias, x.shape[-1:], "x", x)
        check_device("bias", bias, "x", x)


def check_gated(x: Tensor, bias: Tensor | None, gate: str) -> None:
    check_biased(x, bias)
    check_choice("gate", gate, GATES)
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected shape [..., 2 D], got {list(x.shape)}")


def as_rows(x: Tensor) -> Tensor:
    """X [..., D] as [B, L, D]."""
    return x[(None,) * (2 - x.ndim)].unsqueeze(0) if x.ndim < 3 else rows(x)


def y_like(x: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """The result of an operation on x [B, L, D] as a rule for shapes: [B, L, dim]."""
    return x.new_empty((*x.shape[:2], dim), dtype=promoted((x, bias)))


def gradients_like(x: Tensor, bias: Tensor | None, bias_gradient: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the bias as a rule for shapes; the latter is empty where it is not wanted."""
    of_bias = x if bias is None else bias
    return x.new_empty(x.shape), of_bias.new_empty(x.shape[-1] if bias_gradient else 0)


class FeedForward(torch.autograd.Function):
    """Calls the operation `name` with x, bias and `options`, and on the way back the operation `name`_backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, dim: int, name: str, options: tuple[str, ...], backend: str | None
    ) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.call = (name, options, backend)
        y = _backend.implementation(name, backend)(as_rows(x), bias, *options)
        # No view, which autograd would not let anybody modify.
        return y if y.ndim == x.ndim else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], dim))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        name, options, backend = ctx.call
        kernel = _backend.implementation(f"{name}_backward", backend)
        of_bias = bias is not None and ctx.needs_input_grad[1]
        grad_x, grad_bias = kernel(as_rows(grads[0]), as_rows(x), bias, *options, of_bias)
        return grad_x.reshape(x.shape), grad_bias if of_bias else None, None, None, None, None
