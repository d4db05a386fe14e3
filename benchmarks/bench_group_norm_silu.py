"""GroupNorm of 32 groups and SiLU, [B, C, H, W], as in the residual blocks of VQGAN, VAEs and U-Nets."""

import torch
import torch.nn.functional as F
from torch import Tensor

import vqkernels
from benchmarks.denoising import Shape, operations

CASES = [
    Shape("VQGAN", "published", (1, 128, 64, 64)),
    Shape("VAE", "published", (1, 512, 64, 64)),
    Shape("VQGAN", "published", (1, 128, 64, 64), "bfloat16"),
]
GROUPS, EPS = 32, 1e-6


def inputs(case: Shape, device: torch.device) -> list[Tensor]:
    return case.randn(device, case.sizes, (case.sizes[1],), (case.sizes[1],))


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return vqkernels.group_norm_silu(x, GROUPS, weight, bias, eps=EPS)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


tables = operations("group_norm_silu", CASES, ours, plain, inputs)
