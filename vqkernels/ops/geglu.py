"""GEGLU, with a bias before it, in one pass in either direction."""

from torch import Tensor

from vqkernels import reference
from vqkernels.ops import _backend
from vqkernels.ops._checks import check_choice
from vqkernels.ops._feed_forward import APPROXIMATIONS, FeedForward, check_gated, gradients_like, y_like


def _shape_rule(x: Tensor, bias: Tensor | None, gate: str, approximate: str) -> Tensor:
    return y_like(x, bias, x.shape[-1] // 2)


def _backward_shape_rule(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, gate: str, approximate: str, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    return gradients_like(x, bias, bias_gradient)


_backend.define("geglu(Tensor x, Tensor? bias, str gate, str approximate) -> Tensor y", _shape_rule, cuda_kernels=False)
_backend.define(
    "geglu_backward(Tensor grad_y, Tensor x, Tensor? bias, str gate, str approximate, bool bias_gradient) "
    "-> (Tensor grad_x, Tensor grad_bias)",
    _backward_shape_rule,
    cuda_kernels=False,
)


def geglu(
    x: Tensor,
    *,
    bias: Tensor | None = None,
    gate: str = "second",
    approximate: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Multiplies one half of each row by GELU of the other (Shazeer, arXiv 2002.05202, equation 6).

        y = z_1 gelu(z_2),   [z_1, z_2] = x + bias,   gelu as `bias_gelu` has it

    Computes in float32 (float64 where an argument is float64) and rounds once. The backward pass saves x and bias
    alone; the gradient of the bias is a sum in a fixed order, bitwise the same from run to run and for any number of
    threads.

    Args:
        x: [..., 2 D]; float32, float64, bfloat16 or float16, D at least 1.
        bias: [2 D], any of these dtypes; None: 0.
        gate: which half goes through GELU, "first" or "second".
        approximate: "none" or "tanh", as in `bias_gelu`.
        backend: None (what suits the device), "native", "triton" or "reference".

    Returns:
        y, [..., D], in the dtype that x and bias promote to.

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, devices, gate, approximate or backend do not fit.
        RuntimeError: the backend asked for cannot serve the call.
    """
    check_gated(x, bias, gate)
    check_choice("approximate", approximate, APPROXIMATIONS)
    backend = _backend.resolve(backend, x, cuda_kernels=False)
    if backend == "reference":
        return reference.geglu(x, bias=bias, gate=gate, approximate=approximate)
    return FeedForward.apply(x, bias, x.shape[-1] // 2, "geglu", (gate, approximate), backend)
