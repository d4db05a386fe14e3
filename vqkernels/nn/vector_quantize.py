"""The quantizer layer on the fused operations."""

from vqkernels import ops, reference


class Codebook(reference.Codebook):
    """`vqkernels.reference.Codebook` on the fused operations."""

    nearest_code = staticmethod(ops.nearest_code)
    code_statistics = staticmethod(ops.code_statistics)
    ema_update_ = staticmethod(ops.ema_update_)
    vector_quantize = staticmethod(ops.vector_quantize)
    topk_codes = staticmethod(ops.topk_codes)


class VectorQuantize(reference.VectorQuantize):
    __doc__ = reference.VectorQuantize.__doc__

    codebook_class = Codebook
