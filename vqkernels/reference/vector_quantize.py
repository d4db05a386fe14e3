"""Vector quantization whose gradients are left to autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels.reference.code_statistics import code_statistics
from vqkernels.reference.nearest_code import nearest_code


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    mask: Tensor | None = None,
    gradient: str = "straight_through",
    commitment_weight: float = 1.0,
    codebook_weight: float = 0.0,
    statistics: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `vqkernels.vector_quantize`; returns the same five values as a plain tuple."""
    indices = nearest_code(z, codebook, metric=metric, mask=mask)
    quantized, loss = quantize_chosen(
        z,
        codebook,
        indices,
        mask=mask,
        gradient=gradient,
        commitment_weight=commitment_weight,
        codebook_weight=codebook_weight,
    )
    if not statistics:
        return quantized, indices, loss, None, None
    counts, sums = code_statistics(z, indices, codebook.shape[-2], heads=codebook.ndim == 3)
    return quantized, indices, loss, counts, sums.float()


def quantize_chosen(
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    *,
    mask: Tensor | None,
    gradient: str,
    commitment_weight: float,
    codebook_weight: float,
) -> tuple[Tensor, Tensor]:
    """Quantized rows and loss of `vqkernels.vector_quantize`, where codes have been chosen already."""
    chosen = (indices >= 0).unsqueeze(-1)
    wide = torch.float64 if torch.float64 in (z.dtype, codebook.dtype) else torch.float32
    rows = torch.where(chosen, z.to(wide), 0)
    codes = torch.where(chosen, _gather(codebook.to(wide), indices.clamp(min=0)), 0)

    elements = (chosen.sum() * z.shape[-1]).clamp(min=1)
    commitment = (codes.detach() - rows).square().sum() / elements
    codebook_loss = (codes - rows.detach()).square().sum() / elements
    loss = commitment_weight * commitment + codebook_weight * codebook_loss

    # x - x.detach() is zero and carries the gradient, so that quantized rows are codes to the last bit.
    if gradient == "straight_through":
        quantized = codes.detach() + (rows - rows.detach())
    elif gradient == "rotation":
        rotated = _rotate(rows, codes.detach())
        quantized = codes.detach() + (rotated - rotated.detach())
    else:
        quantized = codes
    invalid = ~chosen if mask is None else ~chosen & mask.expand(indices.shape).unsqueeze(-1)
    return quantized.masked_fill(invalid, torch.nan).to(z.dtype), loss


def _gather(codebook: Tensor, indices: Tensor) -> Tensor:
    if codebook.ndim == 2:
        return F.embedding(indices, codebook)
    heads, codes, dim = codebook.shape
    offsets = codes * torch.arange(heads, device=indices.device).reshape(heads, *[1] * (indices.ndim - 1))
    return F.embedding(indices + offsets, codebook.reshape(heads * codes, dim))


def _rotate(e: Tensor, c: Tensor) -> Tensor:
    """The rotation that takes e to the direction of c, as a constant, applied to e (arXiv 2410.06424, section 4.2)."""
    norm_e, norm_c = e.detach().norm(dim=-1, keepdim=True), c.norm(dim=-1, keepdim=True)
    u, q = e.detach() / norm_e.clamp(min=1e-6), c / norm_c.clamp(min=1e-6)
    w = F.normalize(u + q, dim=-1, eps=1e-6)
    rotated = e - 2 * (e * w).sum(-1, keepdim=True) * w + 2 * (e * u).sum(-1, keepdim=True) * q
    return rotated * (norm_c / norm_e.clamp(min=1e-6))
