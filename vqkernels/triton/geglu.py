"""GEGLU as a gated activation."""

from torch import Tensor

from vqkernels.triton.activations import gelu_of
from vqkernels.triton.gated_activation import gated_activation, gated_activation_backward


def geglu(x: Tensor, bias: Tensor | None, gate: str, approximate: str) -> Tensor:
    return gated_activation(x, bias, gate, gelu_of(approximate))


def geglu_backward(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, gate: str, approximate: str, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    return gated_activation_backward(grad_y, x, bias, gate, gelu_of(approximate), bias_gradient)
