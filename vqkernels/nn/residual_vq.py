"""Residual vector quantization on the fused operations."""

from vqkernels import ops, reference
from vqkernels.nn.vector_quantize import VectorQuantize


class ResidualVQ(reference.ResidualVQ):
    __doc__ = reference.ResidualVQ.__doc__

    layer_class = VectorQuantize
    residual_quantize = staticmethod(ops.residual_quantize)


class GroupedResidualVQ(reference.GroupedResidualVQ):
    __doc__ = reference.GroupedResidualVQ.__doc__

    layer_class = ResidualVQ
