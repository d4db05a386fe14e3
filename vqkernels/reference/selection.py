"""Quantization with codes that no search for the nearest one has chosen, in tensor operations."""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels.reference.vector_quantize import _gather, _rotate


def quantize_selected(
    rows: Tensor,
    codes: Tensor,
    indices: Tensor,
    *,
    mask: Tensor | None,
    gradient: str,
    learn: bool,
    soft: Tensor | None = None,
    variance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Quantized rows and their error.

    Args:
        rows: [C, M, D].
        codes: [C, K, D], or [C, M, K, D] where every row has codes of its own.
        indices: int64 [C, M], or [C, M, k] for k codes a row; -1 for none.
        mask: bool [C, M]; rows where it is False are 0 instead of NaN.
        gradient: as for `vqkernels.vector_quantize`; or "directional" (DiVeQ), for which a row is moved by the
            distance to its code, in the direction of that with noise of the variance, and the gradient passes both.
        learn: let the gradient of the error pass to the codes.
        soft: [C, M, D], codes whose gradient the quantized rows have too.
        variance: of the noise.

    Returns:
        quantized: [C, M, D] or [C, M, k, D], in the dtype of rows.
        error: mean squared difference from rows, where there is a code: a scalar, or one for every code, [C, M, k].
    """
    per_code = indices.ndim == 3
    chosen = (indices >= 0).unsqueeze(-1)
    dtype = rows.dtype
    rows = torch.where(chosen, rows.unsqueeze(2) if per_code else rows, 0).to(codes.dtype)
    if codes.ndim == 3:
        picked = _gather(codes, indices.clamp(min=0))
    else:
        positions = indices.clamp(min=0).reshape(*indices.shape[:2], -1, 1).expand(-1, -1, -1, codes.shape[-1])
        picked = codes.gather(2, positions).reshape(*indices.shape, -1)
    picked = torch.where(chosen, picked, 0)

    squares = ((picked if learn else picked.detach()) - rows).square()
    error = squares.mean(-1) if per_code else squares.sum() / (chosen.sum() * squares.shape[-1]).clamp(min=1)

    quantized = picked
    if gradient == "directional":
        quantized = torch.where(chosen, directional(rows, picked, variance), 0)
    elif gradient != "none":
        passed = rows if gradient == "straight_through" else _rotate(rows, picked.detach())
        quantized = picked.detach() + (passed - passed.detach())
    if soft is not None:
        soft = soft.unsqueeze(2) if per_code else soft
        quantized = quantized + torch.where(chosen, soft - soft.detach(), 0)
    absent = ~chosen
    if mask is not None:
        absent = absent & mask.reshape(*mask.shape, *[1] * (absent.ndim - 2))
    return quantized.masked_fill(absent, torch.nan).to(dtype), error


def directional(rows: Tensor, codes: Tensor, variance: float) -> Tensor:
    """Rows moved by the distance to their codes, nearly towards them (DiVeQ, figure 1)."""
    error = codes - rows
    noisy = error + sqrt(variance) * torch.randn_like(error)
    return rows + F.normalize(noisy, dim=-1, eps=1e-6).detach() * error.norm(dim=-1, keepdim=True)
