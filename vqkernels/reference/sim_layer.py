"""Quantizers whose codes are a trained transform of a fixed codebook (SimVQ), as in vector-quantize-pytorch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.reference import _checks, residual
from vqkernels.reference._modules import channels_last, without_autocast
from vqkernels.reference.residual_quantize import residual_quantize
from vqkernels.reference.synchronization import is_distributed
from vqkernels.reference.vector_quantize import vector_quantize


class SimVQ(nn.Module):
    """Replaces vectors by their nearest code; the codes are random vectors behind a trained layer (arXiv 2411.02038).

    Interface, defaults, results and state_dict are those of `SimVQ` in vector-quantize-pytorch 1.32. Beyond it: nothing
    of size rows x codes is stored by the fused twin in `vqkernels.nn`, one graph of torch.compile, quantized rows are
    codes to the last bit also with the rotation trick, a loss in float32 at least. A row with NaN or Inf gets index -1
    and is NaN, and no other row, loss or code notices. Indices are decoded by one transform of the whole codebook, so
    that layers that look at all codes agree with `forward`; index -1 gives zeros.

    Args:
        dim: dimension of the input and of a code.
        codebook_size: codes K.
        codebook_transform: maps [K, frozen_codebook_dim] to the codes [K, dim]; by default a linear layer without bias.
        init_fn: maps the random vectors to the fixed codebook.
        channel_first: input is [B, dim, ...], otherwise [B, ..., dim].
        rotation_trick: rotate gradients (arXiv 2410.06424) instead of passing them straight through.
        input_to_quantize_commit_loss_weight: weight of the loss that draws the input to its codes, against 1 for the
            one that draws codes to the input.
        commitment_weight: weight of both.
        frozen_codebook_dim: dimension of the random vectors, that of the input by default.

    Raises:
        ValueError: arguments are out of range.
    """

    vector_quantize: Callable[..., Any] = staticmethod(vector_quantize)

    frozen_codebook: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] | None = None,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        frozen_codebook_dim = dim if frozen_codebook_dim is None else frozen_codebook_dim
        _checks.check_sizes(dim=dim, codebook_size=codebook_size, frozen_codebook_dim=frozen_codebook_dim)
        _checks.check_numbers(
            low=0,
            input_to_quantize_commit_loss_weight=input_to_quantize_commit_loss_weight,
            commitment_weight=commitment_weight,
        )
        self.dim = dim
        self.codebook_size = codebook_size
        self.channel_first = channel_first
        self.rotation_trick = rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight
        codebook = torch.randn(codebook_size, frozen_codebook_dim) * frozen_codebook_dim**-0.5
        if codebook_transform is None:
            codebook_transform = nn.Linear(frozen_codebook_dim, dim, bias=False)
        self.code_transform = codebook_transform
        self.register_buffer("frozen_codebook", codebook if init_fn is None else init_fn(codebook))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes x.

        The gradient of quantized goes to x alone, that of the loss to x and to code_transform; in evaluation too.

        Args:
            x: [B, ..., dim], or [B, dim, ...] with channel_first; float32, float64, bfloat16 or float16.

        Returns:
            quantized: the shape and dtype of x.
            indices: int64, the shape of x without its channels.
            loss: float32 (float64 for float64) scalar.

        Raises:
            TypeError: x is no tensor of one of these dtypes.
            ValueError: its shape does not fit.
        """
        rows = channels_last(x, self.dim, self.channel_first)
        codebook = self.codebook
        with without_autocast(x):
            quantized, indices, loss, *_ = self.vector_quantize(
                rows,
                codebook,
                gradient="rotation" if self.rotation_trick else "straight_through",
                commitment_weight=self.commitment_weight * self.input_to_quantize_commit_loss_weight,
                codebook_weight=self.commitment_weight,
            )
        return quantized.movedim(-1, 1) if self.channel_first else quantized, indices, loss

    @property
    def codebook(self) -> Tensor:
        """The codes [K, dim]."""
        return self.code_transform(self.frozen_codebook)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """What `forward` returns as quantized for these indices; zeros for -1."""
        _checks.check_indices(indices)
        _checks.check_index_range(indices, self.codebook_size)
        codes = F.embedding(indices.clamp(0, self.codebook_size - 1), self.codebook)
        codes = codes.masked_fill((indices < 0).unsqueeze(-1), 0)
        return codes.movedim(-1, 1) if self.channel_first else codes


class ResidualSimVQ(nn.Module):
    """Levels of `SimVQ`, each on what the ones before it left over.

    Interface, defaults, results and state_dict are those of `ResidualSimVQ` in vector-quantize-pytorch 1.32. Beyond it:
    what is beyond it in `SimVQ`, all levels in one operation, quantize dropout that the host does not wait for and that
    takes any layout, residuals in float32 also in a bfloat16 module, `num_levels`.

    Args:
        dim: dimension of the input and of a code.
        num_quantizers: levels Q of residuals.
        codebook_size: codes K of a level.
        heads: has to be 1.
        quantize_dropout: in training, leave out a random number of the last levels.
        quantize_dropout_cutoff_index: the last level that is never left out.
        quantize_dropout_multiple_of: the number of levels that run is a multiple of it.
        channel_first: input is [B, dim, ...], otherwise [B, ..., dim].
        rotation_trick: see `SimVQ`.
        **sim_vq_kwargs: further arguments of the levels; see `SimVQ`.

    Raises:
        ValueError: arguments contradict each other or are out of range.
    """

    layer_class: type[SimVQ] = SimVQ
    residual_quantize: Callable[..., Any] = staticmethod(residual_quantize)
    layers: Any  # nn.ModuleList of layer_class

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        channel_first: bool = False,
        rotation_trick: bool = True,
        **sim_vq_kwargs: Any,
    ) -> None:
        super().__init__()
        if heads != 1:
            raise ValueError(f"heads: expected 1, got {heads}")
        self.quantize_dropout = residual.check_quantize_dropout(
            quantize_dropout, num_quantizers, quantize_dropout_cutoff_index, quantize_dropout_multiple_of
        )
        self.codebook_dim = dim
        self.codebook_size = codebook_size
        self.num_quantizers = num_quantizers
        self.channel_first = channel_first
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.layers = nn.ModuleList(
            [
                self.layer_class(
                    dim,
                    codebook_size,
                    channel_first=channel_first,
                    rotation_trick=rotation_trick,
                    **sim_vq_kwargs,
                )
                for _ in range(num_quantizers)
            ]
        )

    def forward(
        self,
        x: Tensor,
        return_all_codes: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
        num_levels: int | Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes x.

        Args:
            x: [B, ..., dim], or [B, dim, ...] with channel_first; float32, float64, bfloat16 or float16.
            return_all_codes: also return the codes of every level.
            rand_quantize_dropout_fixed_seed: of the random number of levels.
            num_levels: how many levels run, instead of a random number: an integer from 1 to Q, or an integer scalar
                tensor, whose value is not checked.

        Returns:
            quantized: the shape and dtype of x.
            indices: int64 [B, ..., Q]; -1 for levels that were left out and rows that are not finite.
            losses: [Q]; 0 for these levels.
            codes: with return_all_codes, see `get_codes_from_indices`.

        Raises:
            TypeError: an argument has an unexpected type or dtype.
            ValueError: a shape does not fit, or num_levels is out of range.
        """
        rows = channels_last(x, self.codebook_dim, self.channel_first)
        num_levels = residual.choose_num_levels(self, x, rand_quantize_dropout_fixed_seed, num_levels)
        first, runs = self.layers[0], self.num_quantizers
        # Levels that are left out get no gradient, unless DistributedDataParallel may wait for that of every parameter.
        if isinstance(num_levels, int) and not is_distributed():
            runs, num_levels = num_levels, self.num_quantizers
        with without_autocast(x):
            quantized, indices, losses, *_ = self.residual_quantize(
                rows,
                torch.stack([layer.codebook for layer in self.layers[:runs]]),
                num_levels=None if isinstance(num_levels, int) and num_levels == self.num_quantizers else num_levels,
                gradient="rotation" if first.rotation_trick else "straight_through",
                commitment_weight=first.commitment_weight * first.input_to_quantize_commit_loss_weight,
                codebook_weight=first.commitment_weight,
            )
        quantized = quantized.movedim(-1, 1) if self.channel_first else quantized
        missing = self.num_quantizers - runs
        results = (quantized, F.pad(indices, (0, missing), value=-1), F.pad(losses, (0, missing)))
        return (*results, self.get_codes_from_indices(indices)) if return_all_codes else results

    @property
    def drops_levels(self) -> bool:
        """Whether `forward` leaves out levels at random."""
        return self.training and self.quantize_dropout

    @property
    def codebooks(self) -> Tensor:
        """The codes [Q, K, dim]."""
        return torch.stack([layer.codebook for layer in self.layers])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes [Q, B, ..., dim], or [Q, B, dim, ...] with channel_first, that add up to the output.

        Takes indices [B, ..., Q]; with quantize_dropout they may be those of the first levels alone. Zeros for -1.
        """
        indices = residual.complete_indices(indices, self.num_quantizers, self.quantize_dropout)
        codes = residual.gather_codes(self.codebooks, indices)
        return codes.movedim(-1, 2) if self.channel_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returns as quantized for these indices."""
        return self.get_codes_from_indices(indices).sum(0)
