"""What the operations of the norm chain share: checks of arguments and the one shape in which the kernels take them.

Kernels see x and branch as [B, L, D] and a modulation (shift, scale or gate) as [1, 1, D], [B, 1, D] or [B, L, D].
"""

from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from vqkernels.ops._checks import check_choice
from vqkernels.reference._checks import FLOAT_TYPES, check_device, check_numbers, check_shape, check_tensor, describe

NORMS = ("layer", "rms")
NUMERICS = ("fp32", "eager")

# Over what the gradient of a modulation is summed: nothing is wanted, or its shape is [1, 1, D], [B, 1, D], [B, L, D].
NO_GRADIENT, OF_ALL, OF_BATCH, OF_ROW = range(4)

Second = tuple[Tensor | None, Tensor | None] | None

T = TypeVar("T")


def check_rows(name: str, x: Tensor) -> None:
    check_tensor(name, x, FLOAT_TYPES)
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape [B, ..., D] with D at least 1, got {list(x.shape)}")


def check_branch(x: Tensor, branch: Tensor) -> None:
    check_tensor("branch", branch, FLOAT_TYPES)
    check_shape("branch", branch, x.shape, "x", x)
    check_device("branch", branch, "x", x)


def check_modulation(name: str, value: Tensor | None, x: Tensor) -> None:
    """Checks for shapes [D], [B, D], [B, 1, ..., D] or that of x [B, ..., D]; B may be 1."""
    if value is None:
        return
    check_tensor(name, value, FLOAT_TYPES)
    check_device(name, value, "x", x)
    shape, of_x = value.shape, x.shape
    if len(shape) == 2 and shape[0] == of_x[0] and shape[1] == of_x[-1]:
        return
    fits = len(shape) in (1, 2, len(of_x)) and shape[-1] == of_x[-1]
    if fits and len(shape) > 1:
        fits = shape[0] in (1, of_x[0]) and (shape[1:-1] == of_x[1:-1] or all(size == 1 for size in shape[1:-1]))
    if not fits:
        batch, *middle, dim = of_x
        choices = [[dim], [batch, dim], *([[batch, *[1] * len(middle), dim], list(of_x)] if middle else [])]
        raise ValueError(
            f"{name}: expected shape {' or '.join(map(str, choices))} to match x of shape {list(of_x)}, "
            f"got {list(shape)}"
        )


def check_second(second: object, x: Tensor) -> None:
    if second is None:
        return
    if not isinstance(second, tuple | list) or len(second) != 2:
        raise TypeError(f"second: expected None or a pair (shift, scale), got {describe(second)}")
    check_modulation("second shift", second[0], x)
    check_modulation("second scale", second[1], x)


def check_norm(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float, numerics: str) -> None:
    check_choice("norm", norm, NORMS)
    check_choice("numerics", numerics, NUMERICS)
    check_numbers(low=0, eps=eps)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_tensor(name, value, FLOAT_TYPES)
            check_shape(name, value, x.shape[-1:], "x", x)
            check_device(name, value, "x", x)


def rows(x: Tensor) -> Tensor:
    """X [B, ..., D] as [B, L, D]."""
    return x if x.ndim == 3 else x.reshape(x.shape[0], prod(x.shape[1:-1]), x.shape[-1])


def of_rows(result: Tensor, x: Tensor) -> Tensor:
    """A result [B, L, D] in the shape of x [B, ..., D]."""
    # No view, which autograd would not let anybody modify.
    return result if x.ndim == 3 else torch.ops.aten._unsafe_view(result, x.shape)


def kernel_modulation(value: Tensor | None, x: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
    """A checked modulation of x [B, ..., D] as [1, 1, D], [B, 1, D] or [B, L, D], in `dtype`."""
    if value is None:
        return None
    if value.ndim == 1:
        value = value.view(1, 1, -1)
    elif value.ndim == 2:
        value = value.unsqueeze(1)
    else:
        value = rows(value)
        if value.shape[1] != 1 and value.shape[0] != x.shape[0]:
            value = value.expand(x.shape[0], -1, -1)
    return value if dtype is None or value.dtype == dtype else value.to(dtype)


def kernel_modulations(
    values: Sequence[Tensor | None], x: Tensor, dtype: torch.dtype, unmodulated: torch.dtype
) -> list[Tensor | None]:
    """Shift, scale, shift2 and scale2 for the forward kernels, whose result is `unmodulated` without any of them."""
    modulations = [kernel_modulation(value, x, dtype) for value in values]
    if dtype != unmodulated and all(value is None for value in modulations):
        modulations[0] = x.new_zeros((1, 1, x.shape[-1]), dtype=dtype)  # gives the result its dtype
    return modulations


def used_first(values: Sequence[T], grads: Sequence[Tensor | None]) -> Sequence[T]:
    """What belongs to the first and what to the second result, with the only result in use first; its own inverse."""
    if grads[0] is not None or len(grads) == 1:
        return values
    half = len(values) // 2
    return [*values[half:], *values[:half]]


def backward_arguments(
    grads: Sequence[Tensor | None],
    modulations: Sequence[Tensor | None],
    wanted: Sequence[bool],
    x: Tensor,
    dtype: torch.dtype,
) -> tuple[list[Tensor | None], list[Tensor | None], list[int]]:
    """What the backward kernels take of the modulated results, of which at least one has a gradient.

    A result without one is left out: a gradient of 0 would become NaN where the norm or a scale is not finite. Under
    torch.compile no result is left out, since dynamo gives zeros for those not in use whatever
    `set_materialize_grads(False)` says.

    Args:
        grads: of one result or two, None where it is not in use.
        modulations: shift, scale, shift2 and scale2.
        wanted: whether each of them needs a gradient.
        x: [B, ..., D].
        dtype: of the results.

    Returns:
        grad_y and grad_y2, scale and scale2, and the layouts of the four gradients, all as `used_first` orders them.
    """
    grad, grad2 = used_first(grads if len(grads) == 2 else (grads[0], None), grads)
    assert grad is not None
    values, needs = used_first(modulations, grads), used_first(wanted, grads)
    if grad2 is None:
        values = [values[0], values[1], None, None]
    layouts = [gradient_layout(value, x, need) for value, need in zip(values, needs, strict=True)]
    of_scales = [kernel_modulation(values[1], x, dtype), kernel_modulation(values[3], x, dtype)]
    return [rows(grad), None if grad2 is None else rows(grad2)], of_scales, layouts


def modulation_gradients(
    grads: Sequence[Tensor | None],
    modulations: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
    layouts: Sequence[int],
) -> Sequence[Tensor | None]:
    """Those of shift, scale, shift2 and scale2, of what the kernels gave for `backward_arguments`."""
    return used_first([*map(gradient_of, used_first(modulations, grads), gradients, layouts)], grads)


def gradient_layout(value: Tensor | None, x: Tensor, wanted: bool) -> int:
    """How the kernels sum the gradient of a modulation of x [B, ..., D]."""
    if value is None or not wanted:
        return NO_GRADIENT
    if value.ndim > 2 and any(size != 1 for size in value.shape[1:-1]):
        return OF_ROW
    return OF_BATCH if value.ndim > 1 and value.shape[0] != 1 else OF_ALL


def gradient_of(value: Tensor | None, gradient: Tensor, layout: int) -> Tensor | None:
    """The kernels' gradient in the shape and dtype of the modulation; None where none is wanted."""
    if value is None or layout == NO_GRADIENT:
        return None
    if layout == OF_ROW and value.shape[0] != gradient.shape[0]:
        gradient = gradient.sum(0, keepdim=True, dtype=torch.float64)
    gradient = gradient.reshape(value.shape)
    return gradient if gradient.dtype == value.dtype else gradient.to(value.dtype)


def empty_gradient(x: Tensor, layout: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a modulation as a rule for shapes: `layout` over x [B, L, D]."""
    if layout == NO_GRADIENT:
        return x.new_empty(0, dtype=dtype)
    batch, length, dim = x.shape
    return x.new_empty((1 if layout == OF_ALL else batch, length if layout == OF_ROW else 1, dim), dtype=dtype)


def promoted(tensors: Sequence[Tensor | None]) -> torch.dtype:
    """The dtype of a sum of tensors."""
    return reduce(torch.promote_types, {t.dtype for t in tensors if t is not None})


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """What results of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
