"""Gated residual, then LayerNorm with adaptive shift and scale, [B, L, D]: what stands between the parts of a block."""

import torch
import torch.nn.functional as F
from torch import Tensor

import vqkernels
from benchmarks.bench_norm_modulate import DIT
from benchmarks.denoising import Shape, operations


def inputs(case: Shape, device: torch.device) -> list[Tensor]:
    batch, length, dim = case.sizes
    return case.randn(device, (batch, length, dim), (batch, length, dim), (batch, 3 * dim))


def ours(x: Tensor, branch: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
    return vqkernels.gate_residual_norm_modulate(x, branch, *modulation.chunk(3, -1))


def plain(x: Tensor, branch: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
    gate, shift, scale = modulation.unsqueeze(1).chunk(3, -1)
    residual = x + gate * branch
    return residual, F.layer_norm(residual, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


tables = operations("gate_residual_norm_modulate", DIT, ours, plain, inputs)
