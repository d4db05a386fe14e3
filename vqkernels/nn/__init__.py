"""Layers on the fused operations. Each has a twin of the same name and state_dict in `vqkernels.reference`."""

from vqkernels.nn.vector_quantize import VectorQuantize
from vqkernels.reference import CodeUsage, LossBreakdown

__all__ = ["CodeUsage", "LossBreakdown", "VectorQuantize"]
