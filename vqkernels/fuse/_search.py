"""The search of other people's quantizers."""

from collections.abc import Sequence

from torch import Tensor

from vqkernels.ops import nearest_code, residual_quantize


def nearest(z: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
    """`vqkernels.nearest_code` with code 0 for a row of NaN, which is what argmin answers."""
    return nearest_code(z, codebook, metric=metric).clamp_(min=0)


def nearest_levels(z: Tensor, codebooks: Sequence[Tensor], metric: str = "l2") -> tuple[Tensor, Tensor]:
    """Residual quantization of rows z [..., D], without gradients.

    Returns:
        quantized [..., D]: the codes added up level by level; and indices int64 [..., Q], 0 where a row is NaN.
    """
    result = residual_quantize(z.detach(), [c.detach() for c in codebooks], metric=metric, gradient="none")
    return result.quantized, result.indices.clamp(min=0)
