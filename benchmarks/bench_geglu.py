"""GEGLU, x1 gelu(x2), of [B, L, 2 D], as in the feed-forward of latent diffusion U-Nets."""

import torch
import torch.nn.functional as F
from torch import Tensor

import vqkernels
from benchmarks.denoising import Shape, operations

CASES = [Shape("SD1.5", "published", (2, 1024, 5120))]


def inputs(case: Shape, device: torch.device) -> list[Tensor]:
    return case.randn(device, case.sizes)


def ours(x: Tensor) -> Tensor:
    return vqkernels.geglu(x)


def plain(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return first * F.gelu(second)


tables = operations("geglu", CASES, ours, plain, inputs)
