"""SwiGLU, silu(x1) x2, of [B, L, 2 D]."""

import torch
import torch.nn.functional as F
from torch import Tensor

import vqkernels
from benchmarks.denoising import Shape, operations

CASES = [Shape("LightningDiT-XL", "published", (4, 256, 6144))]


def inputs(case: Shape, device: torch.device) -> list[Tensor]:
    return case.randn(device, case.sizes)


def ours(x: Tensor) -> Tensor:
    return vqkernels.swiglu(x)


def plain(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return F.silu(first) * second


tables = operations("swiglu", CASES, ours, plain, inputs)
