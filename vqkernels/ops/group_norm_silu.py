"""Group normalisation, its affine map and SiLU in one operation."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqkernels import reference
from vqkernels.ops import _backend
from vqkernels.ops._checks import check_choice, wide_type
from vqkernels.reference._checks import (
    FLOAT_TYPES,
    check_device,
    check_numbers,
    check_shape,
    check_sizes,
    check_tensor,
)
from vqkernels.reference._memory_formats import dense_like

ACTIVATIONS = ("silu", "none")


def _shape_rule(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = [x.new_empty((x.shape[0], num_groups), dtype=wide_type(x)) for _ in range(2)]
    return dense_like(x), statistics[0], statistics[1]


def _backward_shape_rule(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    of_channels = [x.new_empty(x.shape[1], dtype=wide_type(x)) for _ in range(2)]
    return dense_like(x), of_channels[0], of_channels[1]


_backend.define(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, str activation) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    _shape_rule,
    cuda_kernels=False,
)
_backend.define(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "str activation) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _backward_shape_rule,
    cuda_kernels=False,
)


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        num_groups: int,
        eps: float,
        activation: str,
        backend: str | None,
    ) -> Tensor:
        norm = _backend.implementation("group_norm_silu", backend)
        y, mean, rstd = norm(x, num_groups, weight, bias, eps, activation)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.options = (activation, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        activation, backend = ctx.options
        norm_backward = _backend.implementation("group_norm_silu_backward", backend)
        grad_x, grad_weight, grad_bias = norm_backward(grads[0], x, weight, bias, mean, rstd, activation)
        return (
            grad_x,
            None if weight is None else grad_weight.to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
            *[None] * 4,
        )


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """Group normalisation (Wu and He, arXiv 1803.08494), its affine map and SiLU.

        h = (x - mean) / sqrt(var + eps) * weight + bias,   y = h * sigmoid(h)

    with mean and (biased) variance over the channels of a group and all positions of a sample. Computed in float32
    (float64 for float64 x) and rounded once. Backward keeps x and two numbers a group; sums have a fixed order, so that
    gradients are bitwise the same from run to run and for any number of threads. Under `torch.autocast` on CUDA the
    result is float32, as `torch.nn.functional.group_norm`'s is.

    Args:
        x: [B, C, ...], contiguous or channels-last (others are copied); float32, float64, bfloat16 or float16.
        num_groups: a divisor of C.
        weight: [C], any of these dtypes; None: 1.
        bias: [C], any of these dtypes; None: 0.
        eps: added to the variance, at least 0.
        activation: "silu", or "none": y = h.
        backend: None (what suits the device), "native", "triton" or "reference".

    Returns:
        y, of the shape, dtype and memory format of x.

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, devices, num_groups, eps, activation or backend do not fit.
        RuntimeError: the backend asked for cannot serve the call.
    """
    check_tensor("x", x, FLOAT_TYPES)
    if x.ndim < 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected shape [B, C, ...] with C at least 1, got {list(x.shape)}")
    check_sizes(num_groups=num_groups)
    channels = x.shape[1]
    if channels % num_groups:
        raise ValueError(f"num_groups: expected a divisor of {channels}, the channels of x, got {num_groups}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_tensor(name, value, FLOAT_TYPES)
            check_shape(name, value, (channels,), "x", x)
            check_device(name, value, "x", x)
    check_numbers(low=0, eps=eps)
    check_choice("activation", activation, ACTIVATIONS)
    backend = _backend.resolve(backend, x, cuda_kernels=False)
    if x.is_cuda and x.dtype != torch.float64 and torch.is_autocast_enabled("cuda"):
        x = x.float()
    if backend == "reference":
        return reference.group_norm_silu(x, num_groups, weight, bias, eps=eps, activation=activation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _GroupNormSilu.apply(x, weight, bias, num_groups, float(eps), activation, backend)
    return _backend.implementation("group_norm_silu", backend)(x, num_groups, weight, bias, float(eps), activation)[0]
