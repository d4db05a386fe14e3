"""Bias and tanh-GELU of a feed-forward's hidden activations, [B, L, 4 D]."""

import torch
import torch.nn.functional as F
from torch import Tensor

import vqkernels
from benchmarks.denoising import Shape, operations

CASES = [
    Shape("DiT-S", "published", (4, 256, 1536)),
    Shape("DiT-XL", "published", (4, 256, 4608)),
    Shape("DiT-XL", "published", (4, 256, 4608), "bfloat16"),
]


def inputs(case: Shape, device: torch.device) -> list[Tensor]:
    return case.randn(device, case.sizes, case.sizes[-1:])


def ours(x: Tensor, bias: Tensor) -> Tensor:
    return vqkernels.bias_gelu(x, bias)


def plain(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


tables = operations("bias_gelu", CASES, ours, plain, inputs)
