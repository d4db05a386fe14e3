"""The operations in plain PyTorch, with the signatures of the public functions: what they mean, written to be read.

Inputs are taken as given: the public functions check them. Scores are rounded as torch's matrix product rounds them, so
codes whose scores differ by less than that may be chosen differently than by the kernels. `VectorQuantize` is the whole
quantizer layer on these operations.
"""

from vqkernels.reference.code_statistics import code_statistics
from vqkernels.reference.codebook import Codebook
from vqkernels.reference.ema_update import ema_update_
from vqkernels.reference.finite_scalar import FSQ
from vqkernels.reference.grouped_residual_layer import GroupedResidualVQ
from vqkernels.reference.layer import VectorQuantize
from vqkernels.reference.layer_results import CodeUsage, LossBreakdown
from vqkernels.reference.lookup_free import LFQ, LFQLossBreakdown, LFQResult
from vqkernels.reference.nearest_code import nearest_code
from vqkernels.reference.random_projection import RandomProjectionQuantizer
from vqkernels.reference.residual_finite_scalar import GroupedResidualFSQ, ResidualFSQ
from vqkernels.reference.residual_layer import ResidualVQ
from vqkernels.reference.residual_lookup_free import GroupedResidualLFQ, ResidualLFQ
from vqkernels.reference.residual_quantize import residual_quantize
from vqkernels.reference.sim_layer import ResidualSimVQ, SimVQ
from vqkernels.reference.topk_codes import topk_codes
from vqkernels.reference.vector_quantize import vector_quantize

__all__ = [
    "FSQ",
    "LFQ",
    "CodeUsage",
    "Codebook",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "LFQLossBreakdown",
    "LFQResult",
    "LossBreakdown",
    "RandomProjectionQuantizer",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualSimVQ",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantize",
    "code_statistics",
    "ema_update_",
    "nearest_code",
    "residual_quantize",
    "topk_codes",
    "vector_quantize",
]
