"""Layer or RMS normalization and the modulation that follows it, in one pass in either direction."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vqkernels import reference
from vqkernels.ops import _backend
from vqkernels.ops._eager_modulation import norm_modulate_eager
from vqkernels.ops._modulation import (
    Second,
    backward_arguments,
    check_modulation,
    check_norm,
    check_rows,
    check_second,
    empty_gradient,
    kernel_modulations,
    modulation_gradients,
    of_rows,
    promoted,
    rows,
    wide_of,
)
from vqkernels.reference.norm_modulate import norm_dtype


def _shape_rule(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = promoted((x, shift, scale, shift2, scale2))
    statistics = x.new_empty(x.shape[:2], dtype=wide_of(dtype))
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape if two else 0, dtype=dtype),
        statistics if norm == "layer" else statistics.new_empty(0),
        torch.empty_like(statistics),
    )


def _backward_shape_rule(
    grad_y: Tensor,
    grad_y2: Tensor | None,
    x: Tensor,
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
        *(empty_gradient(x, layout, grad_y.dtype) for layout in layouts),
        *(p.new_empty(p.shape if affine else 0) if p is not None else x.new_empty(0) for p in (weight, bias)),
    )


_backend.define(
    "norm_modulate(Tensor x, Tensor? shift, Tensor? scale, Tensor? shift2, Tensor? scale2, Tensor? weight, "
    "Tensor? bias, str norm, float eps, bool two) -> (Tensor y, Tensor y2, Tensor mean, Tensor rstd)",
    _shape_rule,
    cuda_kernels=False,
)
_backend.define(
    "norm_modulate_backward(Tensor grad_y, Tensor? grad_y2, Tensor x, Tensor? scale, Tensor? scale2, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor rstd, str norm, int[] layouts, bool affine) -> (Tensor grad_x, "
    "Tensor grad_shift, Tensor grad_scale, Tensor grad_shift2, Tensor grad_scale2, Tensor grad_weight, "
    "Tensor grad_bias)",
    _backward_shape_rule,
    cuda_kernels=False,
)


def _forward(
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
    dtype: torch.dtype,
    backend: str | None,
) -> tuple[Any, Tensor, Tensor]:
    """The result of `norm_modulate`, mean and rstd."""
    modulations = kernel_modulations((shift, scale, shift2, scale2), x, dtype, unmodulated=x.dtype)
    kernel = _backend.implementation("norm_modulate", backend)
    y, y2, mean, rstd = kernel(rows(x), *modulations, weight, bias, norm, eps, two)
    return (of_rows(y, x), of_rows(y2, x)) if two else of_rows(y, x), mean, rstd


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        result, mean, rstd = _forward(*arguments)
        ctx.save_for_backward(*arguments[:7], mean, rstd)
        norm, _, _, dtype, backend = arguments[7:]
        ctx.options = (norm, dtype, backend)
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * 12
        x, *modulations, weight, bias, mean, rstd = ctx.saved_tensors
        norm, dtype, backend = ctx.options
        needed = ctx.needs_input_grad
        of_results, scales, layouts = backward_arguments(grads, modulations, needed[1:5], x, dtype)
        kernel = _backend.implementation("norm_modulate_backward", backend)
        grad_x, *gradients, grad_weight, grad_bias = kernel(
            *of_results, rows(x), *scales, weight, bias, mean, rstd, norm, layouts, needed[5] or needed[6]
        )
        return (
            of_rows(grad_x, x),
            *modulation_gradients(grads, modulations, gradients, layouts),
            grad_weight if needed[5] else None,
            grad_bias if needed[6] else None,
            *[None] * 5,
        )


def norm_modulate(
    x: Tensor,
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
) -> Any:
    """Normalizes rows and modulates them: the adaptive norm of denoising transformers, in one pass each way.

        n = normalized(x) weight + bias,   y = n (1 + scale) + shift

    (adaLN, Peebles & Xie, arXiv 2212.09748, section 3.2). normalized(x) is (x - mean) / sqrt(var + eps) over the last
    dimension, or x / sqrt(mean(x^2) + eps) for RMS (Zhang & Sennrich, arXiv 1910.07467). The backward pass saves the
    inputs and two numbers a row and recomputes the rest; gradients are sums in a fixed order, bitwise the same from
    run to run and for any number of threads. Under torch.compile a result that is not in use has a gradient of 0
    instead of none, which makes gradients NaN where the norm or its scale is not finite.

    Args:
        x: rows, [B, ..., D]; float32, float64, bfloat16 or float16, D at least 1.
        shift: [D], [B, D], [B, 1, ..., D] or the shape of x, any of these dtypes and any strides; None: 0.
        scale: the same; None: 0. Two dimensions are always [B, D], one row for each batch item of x.
        second: (shift, scale) of a second result that modulates the same norm; either may be None.
        norm: "layer" or "rms".
        weight: [D], any of these dtypes; None: 1.
        bias: [D]; None: 0.
        eps: added to the variance, at least 0.
        numerics: "fp32" computes in float32 (float64 where an argument is float64) and rounds once, at the end.
            "eager" rounds where `F.layer_norm(x, (D,), weight, bias, eps) * (1 + scale) + shift` does: values and
            gradients equal those of the expression bit for bit on the same device. Its RMS norm is
            `(x.float() * rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight + bias`.
        backend: None (what suits the device), "native", "triton" or "reference". "eager" runs torch's own kernels under
            each of them.

    Returns:
        y, the shape of x, in the dtype that x, shift and scale promote to; with `second` a tuple (y, second y).

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, devices, norm, eps, numerics or backend do not fit.
        RuntimeError: the backend asked for cannot serve the call.
    """
    check_rows("x", x)
    check_modulation("shift", shift, x)
    check_modulation("scale", scale, x)
    check_second(second, x)
    check_norm(x, norm, weight, bias, eps, numerics)
    backend = _backend.resolve(backend, x, cuda_kernels=False)
    if backend == "reference":
        return reference.norm_modulate(
            x, shift, scale, second=second, norm=norm, weight=weight, bias=bias, eps=eps, numerics=numerics
        )
    if numerics == "eager":
        x = x.to(norm_dtype(x, norm))
        return norm_modulate_eager(x, shift, scale, second, norm, weight, bias, eps)
    shift2, scale2 = (None, None) if second is None else second
    dtype = torch.promote_types(norm_dtype(x, norm), promoted((x, shift, scale, shift2, scale2)))
    two = second is not None
    arguments = (x, shift, scale, shift2, scale2, weight, bias, norm, float(eps), two, dtype, backend)
    return _NormModulate.apply(*arguments) if torch.is_grad_enabled() else _forward(*arguments)[0]
