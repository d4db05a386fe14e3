"""Layers on the fused operations. Each has a twin of the same name and state_dict in `vqkernels.reference`."""

from vqkernels.nn.attn_block import AttnBlock
from vqkernels.nn.dit_block import DiTBlock
from vqkernels.nn.final_layer import FinalLayer
from vqkernels.nn.random_projection import RandomProjectionQuantizer
from vqkernels.nn.residual_vq import GroupedResidualVQ, ResidualVQ
from vqkernels.nn.sim_vq import ResidualSimVQ, SimVQ
from vqkernels.nn.spatial_transformer import SpatialTransformer
from vqkernels.nn.vector_quantize import VectorQuantize
from vqkernels.reference import (
    FSQ,
    LFQ,
    CodeUsage,
    GroupedResidualFSQ,
    GroupedResidualLFQ,
    LFQLossBreakdown,
    LFQResult,
    LossBreakdown,
    ResidualFSQ,
    ResidualLFQ,
)

__all__ = [
    "FSQ",
    "LFQ",
    "AttnBlock",
    "CodeUsage",
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
]
