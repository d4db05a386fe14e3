"""The operations in plain PyTorch, with the signatures of the public functions: what they mean, written to be read.

Inputs are taken as given: the public functions check them. Scores are rounded as torch's matrix product rounds them, so
codes whose scores differ by less than that may be chosen differently than by the kernels. `VectorQuantize` is the whole
quantizer layer on these operations.
"""

from vqkernels.reference.code_statistics import code_statistics
from vqkernels.reference.codebook import Codebook
from vqkernels.reference.ema_update import ema_update_
from vqkernels.reference.layer import VectorQuantize
from vqkernels.reference.layer_results import CodeUsage, LossBreakdown
from vqkernels.reference.nearest_code import nearest_code
from vqkernels.reference.vector_quantize import vector_quantize

__all__ = [
    "CodeUsage",
    "Codebook",
    "LossBreakdown",
    "VectorQuantize",
    "code_statistics",
    "ema_update_",
    "nearest_code",
    "vector_quantize",
]
