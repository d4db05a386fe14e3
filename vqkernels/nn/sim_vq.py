"""Quantizers whose codes are a trained transform of a fixed codebook, on the fused operations."""

from vqkernels import ops, reference


class SimVQ(reference.SimVQ):
    __doc__ = reference.SimVQ.__doc__

    vector_quantize = staticmethod(ops.vector_quantize)


class ResidualSimVQ(reference.ResidualSimVQ):
    __doc__ = reference.ResidualSimVQ.__doc__

    layer_class = SimVQ
    residual_quantize = staticmethod(ops.residual_quantize)
