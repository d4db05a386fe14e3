"""The functional API: one file per operation, with its schema, shape rule, gradient and public function."""

from vqkernels.ops._backend import build_info
from vqkernels.ops.code_statistics import code_statistics
from vqkernels.ops.ema_update import ema_update_
from vqkernels.ops.nearest_code import nearest_code
from vqkernels.ops.vector_quantize import VectorQuantizeResult, vector_quantize

__all__ = [
    "VectorQuantizeResult",
    "build_info",
    "code_statistics",
    "ema_update_",
    "nearest_code",
    "vector_quantize",
]
