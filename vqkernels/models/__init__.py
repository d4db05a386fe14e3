"""Models in plain PyTorch, with the quantizer as an option: the reference or the fused layer."""

from vqkernels.models.checkpoint import load_checkpoint, save_checkpoint
from vqkernels.models.vqvae import VQVAE, VQVAEOutput

__all__ = ["VQVAE", "VQVAEOutput", "load_checkpoint", "save_checkpoint"]
