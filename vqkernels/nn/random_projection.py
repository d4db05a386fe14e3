"""Random projections and random codes on the fused operations."""

from vqkernels import reference
from vqkernels.nn.vector_quantize import VectorQuantize


class RandomProjectionQuantizer(reference.RandomProjectionQuantizer):
    __doc__ = reference.RandomProjectionQuantizer.__doc__

    layer_class = VectorQuantize
