"""Finite scalar quantization (arXiv 2309.15505), with the interface of vector-quantize-pytorch."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vqkernels.reference import _checks
from vqkernels.reference._modules import FixedDtypeBuffers, channels_last, pass_gradient, project, without_autocast


class FSQ(FixedDtypeBuffers):
    """Rounds every channel to one of a few levels; a code is a point of the grid of all channels' levels.

    Interface, defaults, results and state_dict are those of `FSQ` in vector-quantize-pytorch 1.32. Beyond it: one graph
    of torch.compile, any number of positions, levels and rotation in float32 also in a bfloat16 module. Where upstream
    is at odds with itself, this layer differs: noise_dropout is the share of the channels that get noise (upstream
    draws half of them whatever it is), `codes_to_indices` takes what `indices_to_codes` gives also with
    orthogonal_rotation, and decoding works in a bfloat16 module.

    Args:
        levels: number of levels of each channel, at least 2.
        dim: channels of the input; where it is not len(levels) * num_codebooks, the layer projects in and out.
        num_codebooks: groups of len(levels) channels, each with an index of its own.
        keep_num_codebooks_dim: indices have a last dimension num_codebooks; by default with several.
        scale: kept as an attribute; nothing depends on it.
        allowed_dtypes: that force_quantization_f32 leaves as they are.
        channel_first: input is [B, dim, ...]. With four dimensions or more it always is.
        projection_has_bias: of both projections.
        return_indices: otherwise `forward` returns None in their place.
        force_quantization_f32: convert to float32 where the dtype is not in allowed_dtypes.
        preserve_symmetry: levels lie symmetrically from -1 to 1 (arXiv 2411.19842, section 3.2).
        noise_dropout: in training, the share of channels moved by uniform noise; needs preserve_symmetry.
        bound_hard_clamp: limit the input by clamping to [-1, 1] instead of tanh.
        orthogonal_rotation: quantize in a random rotated basis (arXiv 2307.13304).

    Raises:
        ValueError: arguments contradict each other or are out of range.
    """

    _levels: Tensor
    _basis: Tensor
    implicit_codebook: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        scale: float | None = None,
        allowed_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        force_quantization_f32: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        levels = check_levels(levels)
        if 2 in levels and not preserve_symmetry:
            raise ValueError(f"levels: expected at least 3 each without preserve_symmetry, got {levels}")
        if return_indices and math.prod(levels) > torch.iinfo(torch.int32).max:
            raise ValueError(f"levels: expected less than 2^31 codes with return_indices, got {math.prod(levels)}")
        _checks.check_sizes(num_codebooks=num_codebooks, dim=1 if dim is None else dim)
        _checks.check_numbers(low=0, high=1, noise_dropout=noise_dropout)
        if noise_dropout > 0 and not preserve_symmetry:
            raise ValueError(f"noise_dropout: expected 0 without preserve_symmetry, got {noise_dropout}")
        if keep_num_codebooks_dim is None:
            keep_num_codebooks_dim = num_codebooks > 1
        if num_codebooks > 1 and not keep_num_codebooks_dim:
            raise ValueError("keep_num_codebooks_dim: expected True with several codebooks, got False")
        if orthogonal_rotation and len(set(levels)) > 1:
            warnings.warn(
                f"orthogonal_rotation mixes channels, which suits equal levels, not {levels}", UserWarning, stacklevel=2
            )

        self.scale = scale
        self.preserve_symmetry = preserve_symmetry
        self.noise_dropout = noise_dropout
        self.codebook_dim = len(levels)
        self.num_codebooks = num_codebooks
        self.effective_codebook_dim = self.codebook_dim * num_codebooks
        self.keep_num_codebooks_dim = keep_num_codebooks_dim
        self.dim = self.effective_codebook_dim if dim is None else dim
        self.channel_first = channel_first
        self.return_indices = return_indices
        self.allowed_dtypes = allowed_dtypes
        self.force_quantization_f32 = force_quantization_f32
        self.bound_hard_clamp = bound_hard_clamp
        self.orthogonal_rotation = orthogonal_rotation

        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        basis = torch.tensor([1, *levels[:-1]]).cumprod(0, dtype=torch.int32)
        self.register_buffer("_basis", basis, persistent=False)
        self.has_projections = self.dim != self.effective_codebook_dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(self.dim, self.effective_codebook_dim, bias=projection_has_bias)
            self.project_out = nn.Linear(self.effective_codebook_dim, self.dim, bias=projection_has_bias)
        self.codebook_size = math.prod(levels)
        if return_indices:
            codebook = self._indices_to_codes(torch.arange(self.codebook_size))
            self.register_buffer("implicit_codebook", codebook, persistent=False)
        if orthogonal_rotation:
            rotation = nn.init.orthogonal_(torch.empty(self.codebook_dim, self.codebook_dim))
            self.register_buffer("orthogonal_rot", rotation)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantizes z.

        Args:
            z: [B, ..., dim], or [B, dim, ...] where channels are first; float32, float64, bfloat16 or float16.

        Returns:
            quantized: the shape and dtype of z; gradients pass the rounding unchanged.
            indices: int32, the shape of z without its channels, and [..., num_codebooks] where kept; or None.

        Raises:
            TypeError: z is no tensor of one of these dtypes.
            ValueError: its shape does not fit.
        """
        first = self.channel_first or z.ndim >= 4
        z = self.project_in(channels_last(z, self.dim, first)).unflatten(-1, (self.num_codebooks, self.codebook_dim))
        dtype = z.dtype
        with without_autocast(z, self.force_quantization_f32):
            if self.force_quantization_f32 and dtype not in self.allowed_dtypes:
                z = z.float()
            if self.orthogonal_rotation:
                z = z @ self.orthogonal_rot.to(z.dtype)
            codes = self.quantize(z)
            indices = self._levels_to_indices(codes) if self.return_indices else None
            codes = self.maybe_apply_noise(codes)
            if self.orthogonal_rotation:
                codes = codes @ self.orthogonal_rot.to(codes.dtype).mT
            codes = codes.to(dtype)
        quantized = self.project_out(codes.flatten(-2))
        if indices is not None and not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        return quantized.movedim(-1, 1) if first else quantized, indices

    def bound(self, z: Tensor, eps: float = 1e-3, hard_clamp: bool = False) -> Tensor:
        """Limits channels to their levels, rounds, and divides by half the number of levels."""
        half_range = (self._levels - 1) * (1 + eps) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        shift = offset / half_range
        if hard_clamp:
            limited = (z + shift).clamp(-1, 1)
        else:
            limited = (z + shift.atanh()).tanh()
        scaled = limited * half_range - offset
        return pass_gradient(scaled, scaled.round()) / (self._levels // 2)

    def symmetry_preserving_bound(self, z: Tensor, hard_clamp: bool = False) -> Tensor:
        """Rounds to L levels from -1 to 1: 2 / (L - 1) floor((L - 1) (tanh z + 1) / 2 + 1/2) - 1."""
        steps = self._levels - 1
        limited = z.clamp(-1, 1) if hard_clamp else z.tanh()
        scaled = steps * (limited + 1) / 2 + 0.5
        return 2 / steps * pass_gradient(scaled, scaled.floor()) - 1

    def quantize(self, z: Tensor) -> Tensor:
        """The codes, values from -1 to 1, of z [..., len(levels)]; gradients pass the rounding unchanged."""
        bound = self.symmetry_preserving_bound if self.preserve_symmetry else self.bound
        return bound(z, hard_clamp=self.bound_hard_clamp)

    def maybe_apply_noise(self, bounded_z: Tensor) -> Tensor:
        """In training, moves a share of the values by up to 0.5, within [-1, 1]."""
        if not self.training or self.noise_dropout == 0:
            return bounded_z
        moved = torch.zeros_like(bounded_z).bernoulli_(self.noise_dropout).bool()
        noise = torch.rand_like(bounded_z) - 0.5
        return torch.where(moved, bounded_z + noise, bounded_z).clamp(-1, 1)

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """Indices, int32 [...], of codes [..., len(levels)] as `indices_to_codes` gives them without projection."""
        if zhat.shape[-1:] != (self.codebook_dim,):
            raise ValueError(f"zhat: expected shape [..., {self.codebook_dim}], got {list(zhat.shape)}")
        if self.orthogonal_rotation:
            zhat = zhat @ self.orthogonal_rot.to(zhat.dtype)
        return self._levels_to_indices(zhat)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """The level of each channel, [..., len(levels)], of indices [...]."""
        return indices.unsqueeze(-1) // self._basis % self._levels

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """What `forward` returns as quantized for these indices; index -1 counts as the code 0."""
        _checks.check_indices(indices)
        _checks.check_index_range(indices, self.codebook_size)
        codes = self._indices_to_codes(indices).masked_fill((indices < 0).unsqueeze(-1), 0)
        if self.orthogonal_rotation:
            codes = codes @ self.orthogonal_rot.mT
        if self.keep_num_codebooks_dim:
            codes = codes.flatten(-2)
        codes = project(self.project_out, codes)
        first = self.channel_first or indices.ndim >= 3 + self.keep_num_codebooks_dim
        return codes.movedim(-1, 1) if first else codes

    def output_codes(self) -> Tensor:
        """All codes as `forward` returns them, [K, len(levels)]: with their rotation, before project_out."""
        codes = self.implicit_codebook
        return codes @ self.orthogonal_rot.mT if self.orthogonal_rotation else codes

    def _levels_to_indices(self, codes: Tensor) -> Tensor:
        """Indices of codes as `quantize` gives them; -1 where one is NaN."""
        if self.preserve_symmetry:
            levels = (codes + 1) / (2 / (self._levels - 1))
        else:
            levels = codes * (self._levels // 2) + self._levels // 2
        indices = (levels * self._basis).sum(-1)
        return torch.where(indices.isfinite(), indices, -1).round().to(torch.int32)

    def _indices_to_codes(self, indices: Tensor) -> Tensor:
        """Codes as `quantize` gives them."""
        levels = self.indices_to_level_indices(indices)
        if self.preserve_symmetry:
            return levels * (2 / (self._levels - 1)) - 1
        return (levels - self._levels // 2) / (self._levels // 2)


def check_levels(levels: Sequence[int]) -> list[int]:
    if not isinstance(levels, list | tuple) or not levels or not all(isinstance(n, int) and n >= 2 for n in levels):
        raise ValueError(f"levels: expected integers of at least 2, got {levels!r}")
    return list(levels)
