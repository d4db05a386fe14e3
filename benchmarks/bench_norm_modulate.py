"""LayerNorm with adaptive shift and scale, [B, L, D], modulation [B, D] each as a view of one tensor."""

import torch
import torch.nn.functional as F
from torch import Tensor

import vqkernels
from benchmarks.denoising import Shape, operations

DIT = [
    Shape("DiT-S", "published", (4, 256, 384)),
    Shape("DiT-XL", "published", (4, 256, 1152)),
    Shape("SD3", "published", (2, 1024, 1536)),
    Shape("Flux", "published", (1, 1024, 3072)),
    Shape("DiT-XL", "published", (4, 256, 1152), "bfloat16"),
]


def inputs(case: Shape, device: torch.device) -> list[Tensor]:
    batch, length, dim = case.sizes
    return case.randn(device, (batch, length, dim), (batch, 2 * dim))


def ours(x: Tensor, modulation: Tensor) -> Tensor:
    return vqkernels.norm_modulate(x, *modulation.chunk(2, -1))


def plain(x: Tensor, modulation: Tensor) -> Tensor:
    shift, scale = modulation.unsqueeze(1).chunk(2, -1)
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


tables = operations("norm_modulate", DIT, ours, plain, inputs)
