"""Lookup-free quantization (arXiv 2310.05737), with the interface of vector-quantize-pytorch."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqkernels.reference import _checks
from vqkernels.reference._modules import FixedDtypeBuffers, channels_last, pass_gradient, project, without_autocast
from vqkernels.reference.synchronization import is_distributed

# Probabilities of so many pairs of row and code exist at a time; 64 MiB in float32.
PAIRS_AT_A_TIME = 2**24


class LFQResult(NamedTuple):
    """What `LFQ` returns."""

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LFQLossBreakdown(NamedTuple):
    """The parts of the loss of `LFQ`, scalars, unweighted; what the layer does not compute is 0."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class CosineSimLinear(nn.Module):
    """The cosines between x [..., dim_in] and the columns of a weight, times a scale: [..., dim_out]."""

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(dim_in, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) @ F.normalize(self.weight, dim=0) * self.scale


class LFQ(FixedDtypeBuffers):
    """Takes the sign of every channel: the codes are the corners of a cube, and an index is the bits of the signs.

    Interface, defaults, results and state_dict are those of `LFQ` in vector-quantize-pytorch 1.32. Beyond it: no step
    waits for the device or breaks a graph of torch.compile; the entropies of a large batch take bounded memory; float64
    is not narrowed; any number of positions; quantized rows are codes to the last bit also in training. Where upstream
    is at odds with itself, this layer differs:

    - batch_entropy of a batch with a mask [B, N] is that of the mean distribution, as without a mask;
    - in a distributed run that mean is over the rows of all processes;
    - frac_per_sample_entropy takes at least one row, so that small batches have a loss.

    Args:
        dim: channels of the input; by default num_codebooks log2(codebook_size).
        codebook_size: number of codes, a power of 2; by default 2^dim.
        entropy_loss_weight: weight of the entropies in the loss.
        commitment_loss_weight: weight of the mean squared error in the loss.
        diversity_gamma: weight of batch_entropy against per_sample_entropy.
        straight_through_activation: what the gradient passes behind the choice of codes; by default the identity.
        num_codebooks: groups of log2(codebook_size) channels, each with an index of its own.
        keep_num_codebooks_dim: indices have a last dimension num_codebooks; by default with several.
        codebook_scale: codes consist of plus and minus this.
        frac_per_sample_entropy: share of the rows, chosen at random, that entropies are computed from.
        has_projections: project in and out; by default where dim is not num_codebooks log2(codebook_size).
        projection_has_bias: of both projections.
        soft_clamp_input_value: limit the input smoothly to plus or minus this, at least codebook_scale.
        cosine_sim_project_in: project in by cosines.
        cosine_sim_project_in_scale: of the cosines; by default codebook_scale.
        channel_first: input is [B, dim, ...]; by default it is with four dimensions or more.
        experimental_softplus_entropy_loss: pass the entropies' loss through a softplus, which makes it positive.
        entropy_loss_offset: added before the softplus.
        spherical: normalise input and codes to length codebook_scale (arXiv 2406.07548).
        force_quantization_f32: quantize in float32 at least.
        orthogonal_rotation: quantize in a random rotated basis (arXiv 2307.13304).

    Raises:
        ValueError: arguments contradict each other or are out of range.
    """

    mask: Tensor
    zero: Tensor
    codebook: Tensor
    orthogonal_rot: Tensor

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: nn.Module | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        frac_per_sample_entropy: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        cosine_sim_project_in: bool = False,
        cosine_sim_project_in_scale: float | None = None,
        channel_first: bool | None = None,
        experimental_softplus_entropy_loss: bool = False,
        entropy_loss_offset: float = 5.0,
        spherical: bool = False,
        force_quantization_f32: bool = True,
        orthogonal_rotation: bool = False,
    ) -> None:
        super().__init__()
        if dim is None and codebook_size is None:
            raise ValueError("dim, codebook_size: expected at least one of them, got neither")
        if codebook_size is None:
            _checks.check_sizes(dim=dim)
            codebook_size = 2 ** (dim or 1)
        codebook_dim = code_bits(codebook_size)
        _checks.check_sizes(num_codebooks=num_codebooks)
        inner_dim = codebook_dim * num_codebooks
        dim = inner_dim if dim is None else dim
        _checks.check_sizes(dim=dim)
        _checks.check_numbers(low=0, high=1, frac_per_sample_entropy=frac_per_sample_entropy)
        if frac_per_sample_entropy == 0:
            raise ValueError("frac_per_sample_entropy: expected a number greater than 0, got 0")
        if soft_clamp_input_value is not None:
            _checks.check_numbers(low=codebook_scale, soft_clamp_input_value=soft_clamp_input_value)
        has_projections = dim != inner_dim if has_projections is None else has_projections
        if dim != inner_dim and not has_projections:
            raise ValueError(f"has_projections: expected True with dim {dim} and {inner_dim} bits, got False")
        if keep_num_codebooks_dim is None:
            keep_num_codebooks_dim = num_codebooks > 1
        if num_codebooks > 1 and not keep_num_codebooks_dim:
            raise ValueError("keep_num_codebooks_dim: expected True with several codebooks, got False")

        self.dim = dim
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.num_codebooks = num_codebooks
        self.keep_num_codebooks_dim = keep_num_codebooks_dim
        self.has_projections = has_projections
        self.channel_first = channel_first
        self.spherical = spherical
        self.frac_per_sample_entropy = frac_per_sample_entropy
        self.diversity_gamma = diversity_gamma
        self.entropy_loss_weight = entropy_loss_weight
        self.codebook_scale = codebook_scale
        self.commitment_loss_weight = commitment_loss_weight
        self.soft_clamp_input_value = soft_clamp_input_value
        self.entropy_loss_offset = entropy_loss_offset
        self.experimental_softplus_entropy_loss = experimental_softplus_entropy_loss
        self.force_quantization_f32 = force_quantization_f32
        self.orthogonal_rotation = orthogonal_rotation

        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if has_projections:
            if cosine_sim_project_in:
                scale = codebook_scale if cosine_sim_project_in_scale is None else cosine_sim_project_in_scale
                self.project_in = CosineSimLinear(dim, inner_dim, scale)
            else:
                self.project_in = nn.Linear(dim, inner_dim, bias=projection_has_bias)
            self.project_out = nn.Linear(inner_dim, dim, bias=projection_has_bias)
        self.activation = nn.Identity() if straight_through_activation is None else straight_through_activation
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(torch.empty(codebook_dim, codebook_dim)))
        self.register_buffer("mask", 2 ** torch.arange(codebook_dim - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        self.register_buffer("codebook", self._corners(torch.arange(codebook_size)), persistent=False)

    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> LFQResult | tuple[LFQResult, LFQLossBreakdown]:
        """Quantizes x; in training it also computes the loss.

        Args:
            x: [B, ..., dim], or [B, dim, ...] where channels are first; float32, float64, bfloat16 or float16.
            inv_temperature: a row has a code with the probability softmax(2 inv_temperature <row, code>).
            return_loss_breakdown: also return a `LFQLossBreakdown`.
            mask: bool [B, ...], over the positions of x or the first dimensions of them; where it is False, rows have
                no part in the loss. They are quantized all the same.

        Returns:
            quantized: the shape and dtype of x.
            indices: int64, the shape of x without its channels, and [..., num_codebooks] where kept.
            entropy_aux_loss: float32 (float64 for float64) scalar,
                entropy_loss_weight (per_sample_entropy - diversity_gamma batch_entropy) + commitment_loss_weight mse;
                0 in evaluation.

        Raises:
            TypeError: an argument has an unexpected type or dtype.
            ValueError: a shape does not fit.
        """
        first = x.ndim >= 4 if self.channel_first is None else self.channel_first
        z = self.project_in(channels_last(x, self.dim, first))
        mask = None if mask is None else self._position_mask(mask, z)
        dtype = z.dtype
        with without_autocast(z, self.force_quantization_f32):
            if self.force_quantization_f32:
                z = z.to(torch.promote_types(dtype, torch.float32))
            if self.soft_clamp_input_value is not None:
                z = (z / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
            z = z.unflatten(-1, (self.num_codebooks, self.codebook_dim))
            if self.orthogonal_rotation:
                z = z @ self.orthogonal_rot.to(z.dtype)
            z = self._normalize(z)
            positive = z > 0
            indices = (positive * self.mask).sum(-1)
            codes = self._normalize(torch.where(positive, self.codebook_scale, -self.codebook_scale).to(z.dtype))
            entropy_loss = per_sample_entropy = batch_entropy = commitment = self.zero
            if self.training:
                # Padding may hold anything.
                judged = z if mask is None else z.masked_fill(~mask.unsqueeze(-1).unsqueeze(-1), 0)
                per_sample_entropy, batch_entropy = self._entropies(judged, mask, inv_temperature)
                entropy_loss = per_sample_entropy - self.diversity_gamma * batch_entropy
                if self.experimental_softplus_entropy_loss:
                    entropy_loss = F.softplus(entropy_loss + self.entropy_loss_offset)
                if self.commitment_loss_weight > 0:
                    commitment = _masked_mean((judged - codes).square(), mask)
                codes = pass_gradient(self.activation(z), codes)
            if self.orthogonal_rotation:
                codes = codes @ self.orthogonal_rot.to(codes.dtype).mT
            codes = codes.to(dtype)
        quantized = self.project_out(codes.flatten(-2))
        if not self.keep_num_codebooks_dim:
            indices = indices.squeeze(-1)
        loss = entropy_loss * self.entropy_loss_weight + commitment * self.commitment_loss_weight
        result = LFQResult(quantized.movedim(-1, 1) if first else quantized, indices, loss)
        if not return_loss_breakdown:
            return result
        return result, LFQLossBreakdown(per_sample_entropy, batch_entropy, commitment)

    @property
    def dtype(self) -> torch.dtype:
        return self.codebook.dtype

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """0 and 1 to minus and plus codebook_scale."""
        return bits * self.codebook_scale * 2 - self.codebook_scale

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """What `forward` returns as quantized for these indices, or without project_out what it projects.

        Index -1 counts as the zero vector.
        """
        _checks.check_indices(indices)
        _checks.check_index_range(indices, self.codebook_size)
        first = indices.ndim >= 3 + self.keep_num_codebooks_dim if self.channel_first is None else self.channel_first
        if not self.keep_num_codebooks_dim:
            indices = indices.unsqueeze(-1)
        codes = self._to_output(self._corners(indices)).masked_fill((indices < 0).unsqueeze(-1), 0).flatten(-2)
        if project_out:
            codes = project(self.project_out, codes)
        return codes.movedim(-1, 1) if first else codes

    def output_codes(self) -> Tensor:
        """All codes as `forward` returns them, [K, log2 K]: with their length and rotation, before project_out."""
        return self._to_output(self.codebook)

    def _corners(self, indices: Tensor) -> Tensor:
        return self.bits_to_codes(((indices.unsqueeze(-1) & self.mask) != 0).to(torch.float32))

    def _to_output(self, codes: Tensor) -> Tensor:
        codes = self._normalize(codes)
        return codes @ self.orthogonal_rot.mT if self.orthogonal_rotation else codes

    def _normalize(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.codebook_scale if self.spherical else x

    def _position_mask(self, mask: Tensor, z: Tensor) -> Tensor:
        """Checks the mask and gives it the shape of all positions of z [..., channels]."""
        _checks.check_tensor("mask", mask, (torch.bool,))
        _checks.check_device("mask", mask, "x", z)
        if mask.ndim == 0 or mask.shape != z.shape[: min(mask.ndim, z.ndim - 1)]:
            raise ValueError(f"mask: expected shape {list(z.shape[:-1])} or a first part of it, got {list(mask.shape)}")
        return mask.reshape(*mask.shape, *[1] * (z.ndim - 1 - mask.ndim)).expand(z.shape[:-1])

    def _entropies(self, z: Tensor, mask: Tensor | None, inv_temperature: float) -> tuple[Tensor, Tensor]:
        """Mean entropy of the rows' distributions over codes, and entropy of the mean distribution.

        Args:
            z: [..., num_codebooks, log2 K].
            mask: bool [...], or None.
            inv_temperature: see `forward`.
        """
        rows = z.flatten(0, -3)
        weights = rows.new_ones(len(rows)) if mask is None else mask.flatten().to(rows.dtype)
        if self.frac_per_sample_entropy < 1:
            rows, weights = self._choose_rows(rows, weights)
        codebook = self._normalize(self.codebook.to(z.dtype))
        chunk = max(1, PAIRS_AT_A_TIME // (self.num_codebooks * self.codebook_size))
        sum_chunk = partial(_sum_entropies, codebook=codebook, inv_temperature=inv_temperature)
        if len(rows) > chunk:
            # Probabilities of a chunk are computed again in the backward pass.
            sum_chunk = partial(checkpoint, sum_chunk, use_reentrant=False, preserve_rng_state=False)
        entropies, probabilities = rows.new_zeros(()), rows.new_zeros(self.num_codebooks, self.codebook_size)
        for part in zip(rows.split(chunk), weights.split(chunk), strict=True):
            entropy, share = sum_chunk(*part)
            entropies, probabilities = entropies + entropy, probabilities + share
        num_rows = weights.sum()
        per_sample = entropies / (num_rows * self.num_codebooks).clamp(min=1)
        if is_distributed():
            probabilities, num_rows = _sum_over_processes(probabilities, num_rows)
        return per_sample, _entropy(probabilities / num_rows.clamp(min=1)).mean()

    def _choose_rows(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Draws frac_per_sample_entropy of the rows of weight 1, at least one."""
        num = min(len(rows), max(1, int(len(rows) * self.frac_per_sample_entropy)))
        keys, positions = torch.rand(len(rows), device=rows.device).masked_fill(weights == 0, -1).topk(num)
        share = (weights.sum(dtype=torch.float64) * self.frac_per_sample_entropy).floor().clamp(min=1)
        chosen = (torch.arange(num, device=rows.device) < share) & (keys >= 0)
        return rows[positions], chosen.to(rows.dtype)


def code_bits(codebook_size: int) -> int:
    """log2 of a codebook size that is a power of 2."""
    if not isinstance(codebook_size, int) or codebook_size < 2 or codebook_size & (codebook_size - 1):
        raise ValueError(f"codebook_size: expected a power of 2, at least 2, got {codebook_size!r}")
    return codebook_size.bit_length() - 1


def _sum_entropies(rows: Tensor, weights: Tensor, codebook: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """Sums over the rows [M, C, D], by weight, of entropies, a scalar, and of probabilities, [C, K]."""
    probabilities = (2 * (rows @ codebook.mT) * inv_temperature).softmax(-1)
    entropies = (_entropy(probabilities).sum(-1) * weights).sum()
    return entropies, (probabilities * weights.reshape(-1, 1, 1)).sum(0)


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp(min=1e-5).log()).sum(-1)


def _masked_mean(errors: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of errors [..., C, D] over the positions where the mask [...] is True."""
    if mask is None:
        return errors.mean()
    chosen = torch.where(mask.reshape(*mask.shape, 1, 1), errors, 0)
    return chosen.sum() / (mask.sum() * errors.shape[-2:].numel()).clamp(min=1)


def _sum_over_processes(probabilities: Tensor, num_rows: Tensor) -> tuple[Tensor, Tensor]:
    import torch.distributed.nn as distributed  # not part of every build of torch

    sums = distributed.all_reduce(torch.cat([probabilities.flatten(), num_rows.reshape(1)]))
    return sums[:-1].reshape(probabilities.shape), sums[-1]
