"""A gated branch added to the residual stream, in tensor operations."""

from torch import Tensor

from vqkernels.reference.norm_modulate import over_rows, result_dtype, widened


def gate_residual(x: Tensor, branch: Tensor, gate: Tensor | None = None, *, numerics: str = "fp32") -> Tensor:
    """See `vqkernels.gate_residual`."""
    if gate is None:
        return x + branch
    gate = over_rows(gate, x)
    if numerics == "eager":
        return x + gate * branch
    dtype = result_dtype(x, branch, gate)
    return (widened(x, dtype) + widened(gate, dtype) * widened(branch, dtype)).to(dtype)
