"""The operations in plain PyTorch, with the signatures of the public functions: what they mean, written to be read.

Inputs are taken as given: the public functions check them. Scores are rounded as torch's matrix product rounds them, so
codes whose scores differ by less than that may be chosen differently than by the kernels. Layers and blocks are written
here once; those of `vqkernels.nn` are the same on the fused operations.
"""

from vqkernels.reference.attention import attention
from vqkernels.reference.attn_block import AttnBlock
from vqkernels.reference.bias_gelu import bias_gelu
from vqkernels.reference.code_statistics import code_statistics
from vqkernels.reference.codebook import Codebook
from vqkernels.reference.dit_block import DiTBlock
from vqkernels.reference.ema_update import ema_update_
from vqkernels.reference.final_layer import FinalLayer
from vqkernels.reference.finite_scalar import FSQ
from vqkernels.reference.gate_residual import gate_residual
from vqkernels.reference.gate_residual_norm_modulate import gate_residual_norm_modulate
from vqkernels.reference.geglu import geglu
from vqkernels.reference.group_norm_silu import group_norm_silu
from vqkernels.reference.grouped_residual_layer import GroupedResidualVQ
from vqkernels.reference.guided_step import guided_step
from vqkernels.reference.layer import VectorQuantize
from vqkernels.reference.layer_results import CodeUsage, LossBreakdown
from vqkernels.reference.lookup_free import LFQ, LFQLossBreakdown, LFQResult
from vqkernels.reference.nearest_code import nearest_code
from vqkernels.reference.norm_modulate import norm_modulate
from vqkernels.reference.qk_norm_rope import qk_norm_rope
from vqkernels.reference.random_projection import RandomProjectionQuantizer
from vqkernels.reference.residual_finite_scalar import GroupedResidualFSQ, ResidualFSQ
from vqkernels.reference.residual_layer import ResidualVQ
from vqkernels.reference.residual_lookup_free import GroupedResidualLFQ, ResidualLFQ
from vqkernels.reference.residual_quantize import residual_quantize
from vqkernels.reference.rope_tables import rope_tables
from vqkernels.reference.sim_layer import ResidualSimVQ, SimVQ
from vqkernels.reference.spatial_transformer import SpatialTransformer
from vqkernels.reference.swiglu import swiglu
from vqkernels.reference.timestep_embedding import timestep_embedding
from vqkernels.reference.topk_codes import topk_codes
from vqkernels.reference.vector_quantize import vector_quantize

__all__ = [
    "FSQ",
    "LFQ",
    "AttnBlock",
    "CodeUsage",
    "Codebook",
    "DiTBlock",
    "FinalLayer",
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
    "SpatialTransformer",
    "VectorQuantize",
    "attention",
    "bias_gelu",
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
