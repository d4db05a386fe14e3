"""Residual vector quantization, with the interface of vector-quantize-pytorch."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqkernels.reference import _checks, residual
from vqkernels.reference._modules import project, without_autocast
from vqkernels.reference.implicit_codes import ImplicitCodes
from vqkernels.reference.layer import VectorQuantize
from vqkernels.reference.layer_results import CodeUsage, code_usage
from vqkernels.reference.layouts import Layout
from vqkernels.reference.residual_levels import quantize_at_once, quantize_by_beams, quantize_by_level
from vqkernels.reference.residual_quantize import residual_quantize
from vqkernels.reference.selection import directional

# Options of a level that change more than the search, the squared error and the moving averages.
LEVEL_BY_LEVEL = (
    "use_cosine_sim",
    "commitment_use_cross_entropy_loss",
    "orthogonal_reg_weight",
    "codebook_diversity_loss_weight",
    "stochastic_sample_codes",
    "straight_through",
    "directional_reparam",
    "vq_bridge",
    "in_place_codebook_optimizer",
    "affine_param",
    "sync_update_v",
)


DIVEQ_VARIANCE = 5e-3


class ResidualVQ(nn.Module):
    """Levels of `VectorQuantize`, each on what the ones before it left over (arXiv 2107.03312, algorithm 1).

    Interface, defaults, results and state_dict are those of `ResidualVQ` in vector-quantize-pytorch 1.32. Where levels
    only search and follow moving averages, all of them are one fused operation, `vqkernels.residual_quantize`. Beyond
    upstream: residuals in float32 under any dtype of the module; quantize dropout that the host does not wait for where
    levels are one operation, and `num_levels`, one for each sample; feature maps and channels first also with
    projections; cross entropy from indices, and with it the residuals that follow; a beam search that updates all
    levels, not the first alone. A shared codebook replaces dead codes after every level, and not once more at the end.
    With an option that takes the levels one by one, quantize dropout without a seed breaks a graph of torch.compile.

    Args:
        dim: dimension of the input.
        num_quantizers: levels Q; may be left out where codebook_size has one number a level.
        codebook_size: codes K of a level, or of each.
        codebook_dim: dimension D of a code, that of the input by default; otherwise the layer projects in and out.
        shared_codebook: all levels use one codebook.
        diveq: codes learn from the direction of the whole error, with noise (openreview.net/forum?id=KRVnpTbx7R).
        heads: has to be 1.
        quantize_dropout: in training, leave out a random number of the last levels.
        quantize_dropout_cutoff_index: the last level that is never left out.
        quantize_dropout_multiple_of: the number of levels that run is a multiple of it.
        accept_image_fmap: input is [B, dim, H, W].
        implicit_neural_codebook: every level but the first transforms its codes by what was quantized before it (QINCo,
            arXiv 2401.14732).
        mlp_kwargs: of these transformations: dim_hidden, depth.
        beam_size: keep so many beginnings while searching, and take the best at the end.
        eval_beam_size: the same in evaluation; beam_size by default.
        beam_score_quantizer_weights: weights of the levels' errors in that choice.
        quant_grad_frac: share of a level's gradient that reaches the levels before it through the residual.
        return_zeros_for_masked_padding: masked positions are 0, otherwise the input.
        **vq_kwargs: further arguments of the levels; see `VectorQuantize`.

    Raises:
        ValueError: arguments contradict each other or are out of range.
    """

    layer_class: type[VectorQuantize] = VectorQuantize
    residual_quantize: Callable[..., Any] = staticmethod(residual_quantize)

    beam_score_weights: Tensor

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict[str, Any] | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: Sequence[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs: Any,
    ) -> None:
        super().__init__()
        if heads != 1:
            raise ValueError(f"heads: expected 1, got {heads}")
        if eval_beam_size is not None and beam_size is None:
            raise ValueError(f"eval_beam_size: expected None without beam_size, got {eval_beam_size}")
        codebook_sizes = self._sizes(codebook_size, num_quantizers)
        num_quantizers = len(codebook_sizes)
        self.quantize_dropout = residual.check_quantize_dropout(
            quantize_dropout, num_quantizers, quantize_dropout_cutoff_index, quantize_dropout_multiple_of
        )
        self.uniform_codebook_size = len(set(codebook_sizes)) == 1
        if shared_codebook and not self.uniform_codebook_size:
            raise ValueError(f"codebook_size: expected one size for a shared codebook, got {codebook_sizes}")
        if diveq and vq_kwargs.get("ema_update"):
            raise ValueError("diveq, ema_update: expected at most one of them, got both")
        weights = [1.0] * num_quantizers if beam_score_quantizer_weights is None else [*beam_score_quantizer_weights]
        for name, size in (("beam_size", beam_size), ("eval_beam_size", eval_beam_size)):
            if size is not None:
                _checks.check_sizes(**{name: size})
        if len(weights) != num_quantizers:
            raise ValueError(f"beam_score_quantizer_weights: expected {num_quantizers} numbers, got {len(weights)}")
        if implicit_neural_codebook:
            vq_kwargs.update(learnable_codebook=True, ema_update=False)
        if shared_codebook:
            vq_kwargs.update(manual_ema_update=True, manual_in_place_optimizer_update=True)
        if diveq:
            vq_kwargs.update(
                ema_update=False, learnable_codebook=True, route_gradients_to_input=False, commitment_weight=0.0
            )
        codebook_dim = dim if codebook_dim is None else codebook_dim

        self.dim = dim
        self.codebook_dim = codebook_dim
        self.num_quantizers = num_quantizers
        self.codebook_sizes = codebook_sizes
        self.shared_codebook = shared_codebook
        self.diveq = diveq
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.accept_image_fmap = accept_image_fmap
        channel_last, volume = vq_kwargs.pop("channel_last", True), vq_kwargs.pop("accept_3d_fmap", False)
        self.layout = Layout(dim, 1, False, channel_last, accept_image_fmap, volume)
        self.implicit_neural_codebook = implicit_neural_codebook
        self.beam_size = beam_size
        self.eval_beam_size = beam_size if eval_beam_size is None else eval_beam_size
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self._level_by_level = implicit_neural_codebook or any(vq_kwargs.get(name) for name in LEVEL_BY_LEVEL)

        self.has_projections = codebook_dim != dim
        self.project_in = nn.Linear(dim, codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(codebook_dim, dim) if self.has_projections else nn.Identity()
        self.layers = nn.ModuleList(
            [
                self.layer_class(
                    codebook_dim, size, return_zeros_for_masked_padding=return_zeros_for_masked_padding, **vq_kwargs
                )
                for size in codebook_sizes
            ]
        )
        if self.levels[0].has_projections or self.levels[0].heads != 1:
            raise ValueError("codebook_dim, heads: expected levels without projections and heads")
        if shared_codebook:
            for layer in self.levels:
                layer._codebook = self.levels[0]._codebook
        self.mlps: nn.ModuleList | tuple[None, ...] = (None,) * (num_quantizers - 1)
        if implicit_neural_codebook:
            normalized = self.levels[0].use_cosine_sim
            self.mlps = nn.ModuleList(
                [
                    ImplicitCodes(codebook_dim, l2norm_output=normalized, **(mlp_kwargs or {}))
                    for _ in range(num_quantizers - 1)
                ]
            )
        self.register_buffer("beam_score_weights", torch.tensor(weights), persistent=False)
        self.beam_weights = weights

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
        num_levels: int | Tensor | None = None,
        return_statistics: bool = False,
    ) -> tuple[Any, ...]:
        """Quantizes with the codes as they are; in training it then updates them and replaces dead ones.

        Args:
            x: [B, N, dim] or [B, dim], or with channels first [B, dim, ...]; float32, float64, bfloat16 or float16.
            mask: bool [B, N]; positions where it is False take no part and have index -1.
            indices: int64 [..., Q]; return the cross entropy of the levels' distances to them instead.
            return_all_codes: also return the codes of every level.
            sample_codebook_temp: see `VectorQuantize`.
            freeze_codebook: leave the codes alone.
            beam_size: overrides the layer's option.
            rand_quantize_dropout_fixed_seed: of the random number of levels.
            num_levels: how many levels run, instead of a random number: an integer from 1 to Q, or an integer tensor,
                a scalar or [B], whose values are checked only where the host has to know them; [B] only where levels
                are one operation, which they are not before k-means.
            return_statistics: also return a `CodeUsage`.

        Returns:
            quantized: the shape and dtype of x.
            indices: int64 [..., Q], the shape of x without its channels; -1 where masked, invalid or left out.
            losses: float32 [Q]; 0 in evaluation, except in a beam search.
            codes: with return_all_codes, [Q, ..., D]; see `get_codes_from_indices`.
            usage: with return_statistics, a first dimension Q in everything, or a tuple of one each where sizes differ.
            With indices: quantized, and the sum of the cross entropies.

        Raises:
            TypeError: an argument has an unexpected type or dtype.
            ValueError: shapes do not fit, or arguments contradict each other.
        """
        tokens = self.layout.tokens(x)
        mask = _checks.sequence_mask(x, tokens.shape[:2], mask, None)
        beam_size = (self.beam_size if self.training else self.eval_beam_size) if beam_size is None else beam_size
        beam_size = beam_size if beam_size is not None and beam_size > 1 else None
        if indices is not None:
            indices = self._given_indices(indices, x, tokens.shape[:2])
            if beam_size is not None or num_levels is not None:
                raise ValueError("indices, beam_size, num_levels: expected at most one of them")
        # Padding may hold anything: zeros keep it out of the gradients of project_in.
        z = self.project_in(tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0))
        levels = (
            self.num_quantizers
            if indices is not None
            else self._num_levels(z, rand_quantize_dropout_fixed_seed, num_levels)
        )
        at_once = indices is None and self._is_one_operation()
        with without_autocast(x):
            if at_once:
                quantized, codes, losses = quantize_at_once(self, z, mask, levels, freeze_codebook, beam_size)
            elif beam_size is not None:
                quantized, codes, losses = quantize_by_beams(
                    self, z, mask, int(levels), freeze_codebook, sample_codebook_temp, beam_size
                )
            else:
                quantized, codes, losses = quantize_by_level(
                    self, z, mask, int(levels), freeze_codebook, sample_codebook_temp, indices
                )
            if self.training and self.shared_codebook and not freeze_codebook and indices is None:
                self._finish_shared_codebook()
            if self.diveq:
                quantized = directional(z, quantized, DIVEQ_VARIANCE)
        quantized = self.project_out(quantized.to(z.dtype)).to(x.dtype)
        if mask is not None:
            padding = torch.zeros_like(tokens) if self.return_zeros_for_masked_padding else tokens
            quantized = torch.where(mask.unsqueeze(-1), quantized, padding)
        quantized = self.layout.output(quantized, x)
        if indices is not None:
            return quantized, losses.sum()
        codes = codes.reshape(*self.layout.indices_shape(x), self.num_quantizers)
        results: list[Any] = [quantized, codes, losses]
        if return_all_codes:
            results.append(self.get_codes_from_indices(codes))
        if return_statistics:
            results.append(self._usage(codes))
        return tuple(results)

    @property
    def levels(self) -> list[VectorQuantize]:
        """The layers, one for each level."""
        return cast(list[VectorQuantize], list(self.layers))

    @property
    def drops_levels(self) -> bool:
        """Whether a forward runs a random number of levels."""
        return self.training and self.quantize_dropout

    @property
    def codebook_size(self) -> int:
        """Codes of the first level."""
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """float32 [Q, K, D], or [K, D] of each level where sizes differ."""
        codebooks = tuple(layer.codebook for layer in self.levels)
        return torch.stack(codebooks) if self.uniform_codebook_size else codebooks

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes, [Q, ..., D], that add up to the output before project_out; zeros for index -1.

        With quantize_dropout indices [..., Q'] may be those of the first levels alone.
        """
        indices = residual.complete_indices(indices, self.num_quantizers, self.quantize_dropout)
        if self.uniform_codebook_size and not self.implicit_neural_codebook:
            return residual.gather_codes(torch.stack([*self.codebooks]), indices)
        codes: list[Tensor] = []
        quantized: Tensor | None = None
        for codebook, mlp, chosen in zip(self.codebooks, (None, *self.mlps), indices.unbind(-1), strict=True):
            level = residual.gather_codes(codebook.unsqueeze(0), chosen.unsqueeze(-1)).squeeze(0)
            if mlp is not None and quantized is not None:
                level = mlp.transform(level, quantized).masked_fill((chosen < 0).unsqueeze(-1), 0)
            codes.append(level)
            quantized = level if quantized is None else quantized + level
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returns as quantized for these indices, but always with channels last."""
        return project(self.project_out, self.get_codes_from_indices(indices).sum(0))

    def _usage(self, indices: Tensor) -> CodeUsage | tuple[CodeUsage, ...]:
        """How indices [..., Q] use the codes of the levels."""
        chosen = indices.reshape(-1, self.num_quantizers).mT + 1  # 0: none
        counts = chosen.new_zeros(self.num_quantizers, max(self.codebook_sizes) + 1)
        counts = counts.scatter_add(1, chosen, torch.ones_like(chosen))[:, 1:]
        if self.uniform_codebook_size:
            return code_usage(counts)
        return tuple(code_usage(count[:size]) for count, size in zip(counts, self.codebook_sizes, strict=True))

    @staticmethod
    def _sizes(codebook_size: int | tuple[int, ...], num_quantizers: int | None) -> tuple[int, ...]:
        if not isinstance(codebook_size, tuple):
            if num_quantizers is None:
                raise ValueError("num_quantizers: expected an integer with one codebook_size, got None")
            _checks.check_sizes(num_quantizers=num_quantizers)
            return (codebook_size,) * num_quantizers
        if not codebook_size or num_quantizers not in (None, len(codebook_size)):
            raise ValueError(f"codebook_size: expected {num_quantizers} sizes, got {len(codebook_size)}")
        return codebook_size

    def _given_indices(self, indices: Tensor | list[Tensor], x: Tensor, shape: torch.Size) -> Tensor:
        stacked = torch.stack(indices) if isinstance(indices, list) else indices
        _checks.check_indices(stacked)
        expected = torch.Size((*self.layout.indices_shape(x), self.num_quantizers))
        _checks.check_shape("indices", stacked, expected, "x", x)
        return stacked.reshape(*shape, self.num_quantizers)

    def _num_levels(self, z: Tensor, seed: int | None, num_levels: int | Tensor | None) -> int | Tensor:
        if isinstance(num_levels, Tensor) and num_levels.ndim == 1:
            _checks.check_tensor("num_levels", num_levels, _checks.INTEGER_TYPES)
            _checks.check_shape("num_levels", num_levels, z.shape[:1], "x", z)
            if not self._is_one_operation():
                raise ValueError(
                    "num_levels: expected one number for all samples, as the levels are no single operation"
                )
            return num_levels
        levels = residual.choose_num_levels(self, z, seed, num_levels)
        # Nobody waits for a number that the host has drawn itself; where levels are skipped it has to know it.
        known = levels if isinstance(levels, int) or torch.compiler.is_compiling() else None
        if known is None and (z.device.type == "cpu" or not self._is_one_operation() or self._is_synchronized()):
            return residual.check_num_levels(int(levels), self.num_quantizers)
        return levels

    def _is_synchronized(self) -> bool:
        return bool(self.levels[0]._codebook.sync_codebook)

    def _is_one_operation(self) -> bool:
        """Whether all levels are one `residual_quantize`."""
        if self._level_by_level or any(layer._codebook._may_need_init for layer in self.levels):
            return False
        return not self.training or self.quant_grad_frac == 0 or self.diveq

    @torch.no_grad()
    def _finish_shared_codebook(self) -> None:
        layer = self.levels[0]
        if layer.ema_update:
            layer._codebook.finish_pending_()
            layer._codebook.update_ema()
        layer.update_in_place_optimizer()
