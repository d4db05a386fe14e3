"""Models in plain PyTorch, put on the fused operations by `vqkernels.fuse`, or by their choice of quantizer."""

from vqkernels.models.checkpoint import load_checkpoint, save_checkpoint
from vqkernels.models.diffusion import Diffusion
from vqkernels.models.dit import DiT, DiT_models
from vqkernels.models.ema import EMA
from vqkernels.models.samplers import sample
from vqkernels.models.vqvae import VQVAE, VQVAEOutput

__all__ = [
    "EMA",
    "VQVAE",
    "DiT",
    "DiT_models",
    "Diffusion",
    "VQVAEOutput",
    "load_checkpoint",
    "sample",
    "save_checkpoint",
]
