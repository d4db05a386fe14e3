"""Residual lookup-free quantization, with the interface of vector-quantize-pytorch."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vqkernels.reference import residual
from vqkernels.reference._modules import channels_last, project, without_autocast
from vqkernels.reference.lookup_free import LFQ, code_bits


class ResidualLFQ(nn.Module):
    """Levels of `LFQ`, each on what the ones before it left over, with codes half as long.

    Interface, defaults, results and state_dict are those of `ResidualLFQ` in vector-quantize-pytorch 1.32. Beyond it:
    one graph of torch.compile, quantize dropout that the host does not wait for and that takes feature maps, residuals
    in float32 also in a bfloat16 module, projections of feature maps, `num_levels`. `codebooks`, and what is decoded
    with them, are the codes with their length and rotation.

    Args:
        dim: channels of the input; where it is not log2(codebook_size), the layer projects in and out.
        num_quantizers: levels Q of residuals.
        codebook_size: number of codes of a level, a power of 2.
        quantize_dropout: in training, leave out a random number of the last levels.
        quantize_dropout_cutoff_index: the last level that is never left out.
        quantize_dropout_multiple_of: the number of levels that run is a multiple of it.
        soft_clamp_input_value: of the first level, halved at every further one; see `LFQ`.
        **kwargs: further arguments of the levels; see `LFQ`.

    Raises:
        ValueError: arguments contradict each other or are out of range.
    """

    layers: Any  # nn.ModuleList of LFQ

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        codebook_dim = code_bits(codebook_size)
        self.quantize_dropout = residual.check_quantize_dropout(
            quantize_dropout, num_quantizers, quantize_dropout_cutoff_index, quantize_dropout_multiple_of
        )
        if kwargs.get("num_codebooks", 1) != 1:
            raise ValueError(f"num_codebooks: expected 1, got {kwargs['num_codebooks']}")
        if kwargs.get("has_projections"):
            raise ValueError("has_projections: expected None or False, got True")
        self.dim = dim
        self.has_projections = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if self.has_projections else nn.Identity()
        self.num_quantizers = num_quantizers
        self.channel_first = kwargs.get("channel_first")
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.layers = nn.ModuleList()
        for level in range(num_quantizers):
            scale = 2**-level
            clamp = None if soft_clamp_input_value is None else soft_clamp_input_value * scale
            self.layers.append(LFQ(dim=codebook_dim, codebook_scale=scale, soft_clamp_input_value=clamp, **kwargs))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
        num_levels: int | Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes x; in training it also computes the losses.

        Args:
            x: [B, ..., dim], or [B, dim, ...] where channels are first; float32, float64, bfloat16 or float16.
            mask: see `LFQ`.
            return_all_codes: also return the codes of every level.
            rand_quantize_dropout_fixed_seed: of the random number of levels.
            num_levels: how many levels run, instead of a random number: an integer from 1 to Q, or an integer scalar
                tensor, whose value is not checked.

        Returns:
            quantized: the shape and dtype of x.
            indices: int64 [B, ..., Q]; -1 for levels that were left out.
            losses: [Q]; 0 for these levels, and in evaluation.
            codes: with return_all_codes, [Q, B, ..., log2(codebook_size)]; see `get_codes_from_indices`.

        Raises:
            TypeError: an argument has an unexpected type or dtype.
            ValueError: a shape does not fit, or num_levels is out of range.
        """
        first = x.ndim >= 4 if self.channel_first is None else self.channel_first
        z = self.project_in(channels_last(x, self.dim, first))
        dtype = z.dtype
        with without_autocast(z):
            z = z.to(torch.promote_types(dtype, torch.float32))
            quantized, indices, losses = residual.quantize_levels(
                z.movedim(-1, 1) if first else z,
                [partial(layer, mask=mask) for layer in self.layers],
                residual.choose_num_levels(self, z, rand_quantize_dropout_fixed_seed, num_levels),
            )
        quantized = self.project_out((quantized.movedim(1, -1) if first else quantized).to(dtype))
        indices = indices.reshape(*z.shape[:-1], self.num_quantizers)
        results = (quantized.movedim(-1, 1) if first else quantized, indices, losses)
        return (*results, self.get_codes_from_indices(indices)) if return_all_codes else results

    @property
    def drops_levels(self) -> bool:
        """Whether `forward` leaves out levels at random."""
        return self.training and self.quantize_dropout and torch.is_grad_enabled()

    @property
    def codebooks(self) -> Tensor:
        """[Q, K, log2 K]."""
        return torch.stack([layer.output_codes() for layer in self.layers])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes, [Q, B, ..., log2 K], that add up to the output before project_out; zeros for index -1.

        Takes indices [B, ..., Q]; with quantize_dropout they may be those of the first levels alone.
        """
        indices = residual.complete_indices(indices, self.num_quantizers, self.quantize_dropout)
        return residual.gather_codes(self.codebooks, indices)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returns as quantized for these indices, but always [B, ..., dim]."""
        return project(self.project_out, self.get_codes_from_indices(indices).sum(0))


class GroupedResidualLFQ(residual.GroupedResidual):
    """Splits the channels into groups, each quantized by a `ResidualLFQ` of its own.

    Args:
        dim: channels of the input.
        groups: number of groups G.
        accept_image_fmap: input is [B, dim, H, W], or has more dimensions.
        **kwargs: arguments of the groups; see `ResidualLFQ`.
    """

    layer_class = ResidualLFQ

    def forward(self, x: Tensor, mask: Tensor | None = None, return_all_codes: bool = False) -> tuple[Any, ...]:
        """Quantizes x as `ResidualLFQ` does; results behind quantized have a first dimension G; codes are a tuple."""
        return self.quantize_groups(x, mask=mask, return_all_codes=return_all_codes)
