"""A bias and GELU in one pass in either direction."""

from torch import Tensor

from vqkernels import reference
from vqkernels.ops import _backend
from vqkernels.ops._checks import check_choice
from vqkernels.ops._feed_forward import APPROXIMATIONS, FeedForward, check_biased, gradients_like, y_like


def _shape_rule(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return y_like(x, bias, x.shape[-1])


def _backward_shape_rule(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, approximate: str, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    return gradients_like(x, bias, bias_gradient)


_backend.define("bias_gelu(Tensor x, Tensor? bias, str approximate) -> Tensor y", _shape_rule, cuda_kernels=False)
_backend.define(
    "bias_gelu_backward(Tensor grad_y, Tensor x, Tensor? bias, str approximate, bool bias_gradient) "
    "-> (Tensor grad_x, Tensor grad_bias)",
    _backward_shape_rule,
    cuda_kernels=False,
)


def bias_gelu(
    x: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh", backend: str | None = None
) -> Tensor:
    """Adds a bias and applies GELU (Hendrycks & Gimpel, arXiv 1606.08415), in one pass each way.

        y = z F(z),   z = x + bias,   F the cumulative standard normal distribution

    Computes in float32 (float64 where an argument is float64) and rounds once. The backward pass saves x and bias
    alone; the gradient of the bias is a sum in a fixed order, bitwise the same from run to run and for any number of
    threads.

    Args:
        x: [..., D]; float32, float64, bfloat16 or float16, D at least 1.
        bias: [D], any of these dtypes; None: 0.
        approximate: "tanh" for F(z) = (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2, or "none".
        backend: None (what suits the device), "native", "triton" or "reference".

    Returns:
        y, the shape of x, in the dtype that x and bias promote to.

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, devices, approximate or backend do not fit.
        RuntimeError: the backend asked for cannot serve the call.
    """
    check_biased(x, bias)
    check_choice("approximate", approximate, APPROXIMATIONS)
    backend = _backend.resolve(backend, x, cuda_kernels=False)
    if backend == "reference":
        return reference.bias_gelu(x, bias, approximate=approximate)
    return FeedForward.apply(x, bias, x.shape[-1], "bias_gelu", (approximate,), backend)
