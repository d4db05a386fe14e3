"""SwiGLU as a gated activation."""

from torch import Tensor

from vqkernels.triton.activations import SILU
from vqkernels.triton.gated_activation import gated_activation, gated_activation_backward


def swiglu(x: Tensor, bias: Tensor | None, gate: str) -> Tensor:
    return gated_activation(x, bias, gate, SILU)


def swiglu_backward(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, gate: str, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    return gated_activation_backward(grad_y, x, bias, gate, SILU, bias_gradient)
