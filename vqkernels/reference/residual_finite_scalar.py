"""Residual finite scalar quantization, with the interface of vector-quantize-pytorch."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vqkernels.reference import residual
from vqkernels.reference._modules import FixedDtypeBuffers, channels_last, project, without_autocast
from vqkernels.reference.finite_scalar import FSQ, check_levels


class ResidualFSQ(FixedDtypeBuffers):
    """Levels of `FSQ`, each on what the ones before it left over, and finer by its number of levels.

    Interface, defaults, results and state_dict are those of `ResidualFSQ` in vector-quantize-pytorch 1.32. Beyond it:
    one graph of torch.compile, quantize dropout that the host does not wait for, residuals in float32 also in a
    bfloat16 module, any number of positions, `num_levels`. With is_channel_first, indices are decoded in the layout in
    which `forward` gives them; `codebooks`, and what is decoded with them, are the codes with their rotation.

    Args:
        levels: number of levels of each channel, at least 2.
        num_quantizers: levels Q of residuals.
        dim: channels of the input; where it is not len(levels), the layer projects in and out.
        is_channel_first: input is [B, dim, ...], indices are [B, Q, ...].
        quantize_dropout: in training, leave out a random number of the last levels.
        quantize_dropout_cutoff_index: the last level that is never left out.
        quantize_dropout_multiple_of: the number of levels that run is a multiple of it.
        soft_clamp_input_value: limit the input to plus or minus this, one number or one for each channel; by default
            1 + 1 / (levels - 1) with bound_hard_clamp, which allows no other.
        bound_hard_clamp: see `FSQ`.
        **kwargs: further arguments of the levels; see `FSQ`.

    Raises:
        ValueError: arguments contradict each other or are out of range.
    """

    layers: Any  # nn.ModuleList of FSQ
    scales: Tensor
    soft_clamp_input_value: Tensor | None

    def __init__(
        self,
        *,
        levels: list[int],
        num_quantizers: int,
        dim: int | None = None,
        is_channel_first: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        soft_clamp_input_value: float | list[float] | Tensor | None = None,
        bound_hard_clamp: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        level_counts = torch.tensor(check_levels(levels))
        self.quantize_dropout = residual.check_quantize_dropout(
            quantize_dropout, num_quantizers, quantize_dropout_cutoff_index, quantize_dropout_multiple_of
        )
        if not kwargs.get("return_indices", True):
            raise ValueError("return_indices: expected True, got False")
        if kwargs.get("num_codebooks", 1) != 1:
            raise ValueError(f"num_codebooks: expected 1, got {kwargs['num_codebooks']}")
        if bound_hard_clamp:
            if soft_clamp_input_value is not None:
                raise ValueError(
                    f"soft_clamp_input_value: expected None with bound_hard_clamp, got {soft_clamp_input_value!r}"
                )
            soft_clamp_input_value = 1 + 1 / (level_counts - 1)
        elif soft_clamp_input_value is not None:
            soft_clamp_input_value = torch.as_tensor(soft_clamp_input_value, dtype=torch.float32)

        codebook_dim = len(levels)
        dim = codebook_dim if dim is None else dim
        self.has_projections = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if self.has_projections else nn.Identity()
        self.dim = dim
        self.is_channel_first = is_channel_first
        self.num_quantizers = num_quantizers
        self.levels = levels
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.layers = nn.ModuleList(
            [
                FSQ(levels, codebook_dim, preserve_symmetry=True, bound_hard_clamp=bound_hard_clamp, **kwargs)
                for _ in range(num_quantizers)
            ]
        )
        self.codebook_size = self.layers[0].codebook_size
        scales = torch.stack([level_counts.float() ** -level for level in range(num_quantizers)])
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("soft_clamp_input_value", soft_clamp_input_value, persistent=False)

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
        num_levels: int | Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes x.

        Args:
            x: [B, ..., dim], or [B, dim, ...] with is_channel_first; float32, float64, bfloat16 or float16.
            return_all_codes: also return the codes of every level.
            rand_quantize_dropout_fixed_seed: of the random number of levels.
            num_levels: how many levels run, instead of a random number: an integer from 1 to Q, or an integer scalar
                tensor, whose value is not checked.

        Returns:
            quantized: the shape and dtype of x.
            indices: [B, ..., Q], or [B, Q, ...] with is_channel_first; -1 for levels that were left out. int32; int64
                where levels can be left out.
            codes: with return_all_codes, [Q, B, ..., len(levels)]; see `get_codes_from_indices`.

        Raises:
            TypeError: an argument has an unexpected type or dtype.
            ValueError: a shape does not fit, or num_levels is out of range.
        """
        z = self.project_in(channels_last(x, self.dim, self.is_channel_first))
        dtype, shape = z.dtype, z.shape
        with without_autocast(x):
            z = z.to(torch.promote_types(dtype, torch.float32)).flatten(1, -2) if z.ndim > 2 else z.unsqueeze(1)
            if self.soft_clamp_input_value is not None:
                z = (z / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
            quantized, indices, _ = residual.quantize_levels(
                z,
                [
                    partial(_quantize_scaled, layer, scale)
                    for layer, scale in zip(self.layers, self.scales, strict=True)
                ],
                residual.choose_num_levels(self, z, rand_quantize_dropout_fixed_seed, num_levels),
            )
        quantized = self.project_out(quantized.to(dtype).reshape(shape))
        indices = indices.reshape(*shape[:-1], self.num_quantizers)
        if self.is_channel_first:
            quantized, indices = quantized.movedim(-1, 1), indices.movedim(-1, 1)
        if not return_all_codes:
            return quantized, indices
        return quantized, indices, self.get_codes_from_indices(indices)

    @property
    def drops_levels(self) -> bool:
        """Whether `forward` leaves out levels at random."""
        return self.training and self.quantize_dropout and torch.is_grad_enabled()

    @property
    def codebooks(self) -> Tensor:
        """[Q, K, len(levels)], before the levels' scales."""
        return torch.stack([layer.output_codes() for layer in self.layers])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes, [Q, B, ..., len(levels)], that add up to the output before project_out; zeros for index -1.

        With quantize_dropout indices may be those of the first levels alone.
        """
        if self.is_channel_first and isinstance(indices, Tensor) and indices.ndim > 1:
            indices = indices.movedim(1, -1)
        indices = residual.complete_indices(indices, self.num_quantizers, self.quantize_dropout)
        codes = residual.gather_codes(self.codebooks, indices)
        return codes * self.scales.reshape(self.num_quantizers, *[1] * (codes.ndim - 2), -1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returns as quantized for these indices."""
        output = project(self.project_out, self.get_codes_from_indices(indices).sum(0))
        return output.movedim(-1, 1) if self.is_channel_first else output


def _quantize_scaled(layer: FSQ, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, indices = layer(x / scale)
    return codes * scale, indices, x.new_zeros(())


class GroupedResidualFSQ(residual.GroupedResidual):
    """Splits the channels into groups, each quantized by a `ResidualFSQ` of its own.

    Args:
        dim: channels of the input.
        groups: number of groups G.
        accept_image_fmap: input is [B, dim, ...]; groups then take channels first, unless is_channel_first says no.
        **kwargs: arguments of the groups; see `ResidualFSQ`.
    """

    layer_class = ResidualFSQ

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        first = kwargs.setdefault("is_channel_first", accept_image_fmap)
        if first != accept_image_fmap:
            raise ValueError(f"is_channel_first: expected {accept_image_fmap} as accept_image_fmap, got {first}")
        super().__init__(dim=dim, groups=groups, accept_image_fmap=accept_image_fmap, **kwargs)
        self.codebook_size = self.rvqs[0].codebook_size

    def forward(self, x: Tensor, return_all_codes: bool = False) -> tuple[Any, ...]:
        """Quantizes x as `ResidualFSQ` does; results behind quantized have a first dimension G; codes are a tuple."""
        return self.quantize_groups(x, return_all_codes=return_all_codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returns as quantized for indices [G, ...]."""
        outputs = [layer.get_output_from_indices(i) for layer, i in zip(self.rvqs, indices, strict=True)]
        return torch.cat(outputs, self.split_dim)
