"""Steps that the fused forms of several libraries share."""

import torch
from torch import Tensor

from vqkernels.ops import vector_quantize


def lookup(rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes of rows [N, D] as they stand in the codebook, which alone gets their gradient; and indices."""
    rows = rows.detach().to(torch.promote_types(rows.dtype, codebook.dtype))
    found = vector_quantize(rows, codebook, gradient="none", commitment_weight=0.0)
    return found.quantized, found.indices.clamp(min=0)


def quantize_image(
    z: Tensor, codebook: Tensor, commitment_weight: float, codebook_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes the positions of z [B, C, H, W] straight-through.

    Returns:
        quantized [B, C, H, W], contiguous; the loss in the wider dtype of z and codebook; indices int64 [N] of rows of
        the width of the codebook.
    """
    rows = z.permute(0, 2, 3, 1)
    shape = rows.shape
    rows = rows.reshape(-1, codebook.shape[1]).to(torch.promote_types(z.dtype, codebook.dtype))
    quantized, indices, loss, _, _ = vector_quantize(
        rows, codebook, commitment_weight=commitment_weight, codebook_weight=codebook_weight
    )
    # The rows' gradient alone: without the loss the codebook has none, not one of zeros that an optimiser would act on.
    quantized = rows + (quantized - rows).detach()
    quantized = quantized.view(shape).permute(0, 3, 1, 2).contiguous()
    return quantized, loss.to(rows.dtype), indices.clamp(min=0)


def one_hot(indices: Tensor, num_codes: int, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] that some libraries return, 1 where a row has its code."""
    matrix = torch.zeros(len(indices), num_codes, dtype=dtype, device=indices.device)
    return matrix.scatter_(1, indices.unsqueeze(1), 1)


def perplexity(encodings: Tensor) -> Tensor:
    """How many of the codes a one-hot matrix [N, K] uses: the exponential of the entropy of their shares."""
    share = encodings.mean(0)
    return torch.exp(-torch.sum(share * torch.log(share + 1e-10)))


def image(rows: Tensor) -> Tensor:
    """Rows [32, D] as [2, D, 4, 4]."""
    return rows.view(2, 4, 4, -1).permute(0, 3, 1, 2).contiguous()


def several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and value >= 0


def is_single(*tensors: Tensor) -> bool:
    """Whether all are float32, as the state is that `ema_update_` and `code_statistics` serve."""
    return all(t.dtype == torch.float32 for t in tensors)
