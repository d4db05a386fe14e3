"""Layer or RMS normalization and the modulation that follows it, in tensor operations."""

from functools import reduce
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def norm_modulate(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    second: tuple[Tensor | None, Tensor | None] | None = None,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    numerics: str = "fp32",
) -> Tensor | tuple[Tensor, Tensor]:
    """See `vqkernels.norm_modulate`."""
    modulations = [(shift, scale), *([] if second is None else [second])]
    dtype = torch.promote_types(
        norm_dtype(x, norm), result_dtype(x, *(value for pair in modulations for value in pair))
    )
    if numerics == "fp32":
        x, weight, bias = widened(x, dtype), widened(weight, dtype), widened(bias, dtype)
    normalized = normalize(x, norm, weight, bias, eps)
    outputs = []
    for pair in modulations:
        shift, scale = (None if value is None else over_rows(value, x) for value in pair)
        if numerics == "fp32":
            shift, scale = widened(shift, dtype), widened(scale, dtype)
        y = normalized if scale is None else normalized * (1 + scale)
        y = y if shift is None else y + shift
        outputs.append(y.to(dtype) if numerics == "fp32" else y)
    return outputs[0] if second is None else (outputs[0], outputs[1])


def normalize(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The normalization alone, over the last dimension, rounded where torch rounds."""
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = (x.to(wide) * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def norm_dtype(x: Tensor, norm: str) -> torch.dtype:
    """The dtype of `normalize(x, norm)`: that of x, or float32 where autocast says so."""
    if norm == "layer" and torch.is_autocast_enabled(x.device.type):
        return F.layer_norm(x.new_zeros(1), (1,)).dtype
    return x.dtype


def over_rows(modulation: Tensor, x: Tensor) -> Tensor:
    """A modulation [B, D] as [B, 1, ..., D], so that it meets all rows of its batch item in x [B, ..., D]."""
    if modulation.ndim == 2 and x.ndim > 2:
        return modulation.reshape(modulation.shape[0], *[1] * (x.ndim - 2), modulation.shape[1])
    return modulation


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of a sum of these tensors."""
    return reduce(torch.promote_types, [t.dtype for t in tensors if t is not None])


def widened(value: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    """A tensor in what results of a dtype are computed in: float64 for float64, else float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return value if value is None else value.to(wide)
