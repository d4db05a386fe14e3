"""The functional API: one file per operation, with its schema, shape rule, gradient and public function."""

from vqkernels.ops._backend import build_info
from vqkernels.ops.attention import attention
from vqkernels.ops.bias_gelu import bias_gelu
from vqkernels.ops.code_statistics import code_statistics
from vqkernels.ops.ema_update import ema_update_
from vqkernels.ops.gate_residual import gate_residual
from vqkernels.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from vqkernels.ops.geglu import geglu
from vqkernels.ops.group_norm_silu import group_norm_silu
from vqkernels.ops.guided_step import guided_step
from vqkernels.ops.nearest_code import nearest_code
from vqkernels.ops.norm_modulate import norm_modulate
from vqkernels.ops.qk_norm_rope import qk_norm_rope
from vqkernels.ops.residual_quantize import ResidualQuantizeResult, residual_quantize
from vqkernels.ops.rope_tables import rope_tables
from vqkernels.ops.swiglu import swiglu
from vqkernels.ops.timestep_embedding import timestep_embedding
from vqkernels.ops.topk_codes import topk_codes
from vqkernels.ops.vector_quantize import VectorQuantizeResult, vector_quantize

__all__ = [
    "ResidualQuantizeResult",
    "VectorQuantizeResult",
    "attention",
    "bias_gelu",
    "build_info",
    "code_statistics",
    "ema_update_",
    "gate_residual",
    "gate_residual_norm_modulate",
    "geglu",
    "group_norm_silu",
    "guided_step",
    "nearest_code",
    "norm_modulate",
    "qk_norm_rope",
    "residual_quantize",
    "rope_tables",
    "swiglu",
    "timestep_embedding",
    "topk_codes",
    "vector_quantize",
]
