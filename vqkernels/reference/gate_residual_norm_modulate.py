"""A gated branch added to the residual stream, and the modulated norm of the sum, in tensor operations."""

import torch
from torch import Tensor

from vqkernels.reference.gate_residual import gate_residual
from vqkernels.reference.norm_modulate import norm_dtype, norm_modulate, result_dtype, widened


def gate_residual_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    second: tuple[Tensor | None, Tensor | None] | None = None,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    numerics: str = "fp32",
) -> tuple[Tensor, ...]:
    """See `vqkernels.gate_residual_norm_modulate`."""
    residual_dtype = result_dtype(x, branch, gate)
    pair = () if second is None else second
    dtype = result_dtype(x, branch, gate, shift, scale, *pair)
    dtype = torch.promote_types(dtype, norm_dtype(x.new_empty(0, dtype=residual_dtype), norm))
    if numerics == "fp32":
        x, branch, gate = widened(x, dtype), widened(branch, dtype), widened(gate, dtype)
    residual = gate_residual(x, branch, gate, numerics=numerics)
    normalized = norm_modulate(
        residual, shift, scale, second=second, norm=norm, weight=weight, bias=bias, eps=eps, numerics=numerics
    )
    outputs = normalized if isinstance(normalized, tuple) else (normalized,)
    if numerics == "eager":
        return (residual, *outputs)
    return (residual.to(residual_dtype), *(y.to(dtype) for y in outputs))
