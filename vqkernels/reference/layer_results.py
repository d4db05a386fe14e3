"""What a quantizer layer can return beside its quantized vectors, indices and loss."""

from typing import NamedTuple

import torch
from torch import Tensor


class LossBreakdown(NamedTuple):
    """The parts of the loss, float32 scalars, unweighted; what the layer does not compute is 0."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class CodeUsage(NamedTuple):
    """How a batch used the codes; with separate_codebook_per_head everything has a first dimension H."""

    counts: Tensor  # int64 [K], rows that chose a code
    perplexity: Tensor  # float32, exp of the entropy of the histogram
    usage: Tensor  # float32, share of the codes that were chosen at least once


def code_usage(counts: Tensor) -> CodeUsage:
    """Perplexity and usage of counts, int64 [K] or [H, K]; without any rows they are 1 and 0."""
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return CodeUsage(counts, torch.special.entr(share).sum(-1).exp(), (counts > 0).float().mean(-1))
