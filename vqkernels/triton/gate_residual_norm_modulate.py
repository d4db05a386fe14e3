"""A gated branch added to the residual stream, and the modulated norm of the sum: kernels of norm_modulate.py."""

from torch import Tensor

from vqkernels.triton.norm_modulate import backward, forward


def gate_residual_norm_modulate(
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
    """The residual x + gate * branch [B, L, D], and what `norm_modulate` gives for it before it is rounded."""
    residual, y, y2, mean, rstd = forward(x, branch, gate, shift, scale, shift2, scale2, weight, bias, norm, eps, two)
    assert residual is not None
    return residual, y, y2, mean, rstd


def gate_residual_norm_modulate_backward(
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
    """Gradients of x, branch, gate, shift, scale, shift2, scale2, weight and bias.

    Without branch and gate, x is the residual, and its gradient that of x and branch alike.
    """
    return backward(
        *(grad_residual, grad_y, grad_y2, x, branch, gate, scale, scale2, weight, bias, mean, rstd, norm),
        *(layouts, affine),
    )
