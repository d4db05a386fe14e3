"""The functional API: one file per operation, with its schema, shape rule, gradient and public function."""

from vqkernels.ops._backend import build_info
from vqkernels.ops.code_statistics import code_statistics
from vqkernels.ops.ema_update import ema_update_
from vqkernels.ops.nearest_code import nearest_code
from vqkernels.ops.residual_quantize import ResidualQuantizeResult, residual_quantize
from vqkernels.ops.topk_codes import topk_codes
from vqkernels.ops.vector_quantize import VectorQuantizeResult, vector_quantize

__all__ = [
    "ResidualQuantizeResult",
    "VectorQuantizeResult",
    "build_info",
    "code_statistics",
    "ema_update_",
    "nearest_code",
    "residual_quantize",
    "topk_codes",
    "vector_quantize",
]
