"""The quantizer layer, with the interface of vector-quantize-pytorch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.reference import _checks
from vqkernels.reference.codebook import Codebook
from vqkernels.reference.layer_results import LossBreakdown, code_usage


class VectorQuantize(nn.Module):
    """Replaces vectors by their nearest code, and trains the codes.

    Interface, defaults, results and state_dict are those of `VectorQuantize` in vector-quantize-pytorch 1.32. Beyond
    it: no step waits for the device or breaks a graph of torch.compile; the codebook is float32 under any dtype of the
    module and under autocast; a row with NaN or Inf gets index -1 and is NaN, and no other row, loss or code notices;
    forward has `return_statistics`. Where upstream is at odds with itself, this layer differs:

    - the loss of a masked batch is that of its unmasked rows alone, also with projections, heads or cosine;
    - after k-means an empty cluster keeps its centre instead of becoming the zero vector;
    - the `codebook` setter also sets the statistics, so that the next EMA step does not undo it;
    - codes and outputs from indices are right for shared heads and channel-first layouts, and 0 for index -1;
    - project_in gets the gradient of the output even if x needs none;
    - ema_update is off by default if the codebook is learnable.

    Args:
        dim: dimension of the input.
        codebook_size: codes K of a codebook.
        codebook_dim: dimension D of a code, that of the input by default. Where heads * codebook_dim is not dim, the
            layer projects in and out.
        heads: parts of a vector that are quantized on their own.
        separate_codebook_per_head: a codebook for every head; otherwise all share one.
        decay: of the moving averages the codes are made of.
        eps: of their Laplace smoothing.
        freeze_codebook: never change the codebook.
        kmeans_init: take the centres of the first batch as codes.
        kmeans_iters: iterations of that.
        sync_kmeans: has no effect in a single process.
        use_cosine_sim: normalise input and codes to length 1.
        layernorm_after_project_in: LayerNorm behind the projection, where there is one.
        threshold_ema_dead_code: codes with a smaller cluster size are replaced by rows of the batch; 0: never.
        channel_last: input is [B, N, dim], otherwise [B, dim, N].
        accept_image_fmap: input is [B, dim, H, W].
        accept_3d_fmap: input is [B, dim, D, H, W].
        commitment_weight: weight of the loss that draws the input to its codes.
        rotation_trick: rotate gradients (arXiv 2410.06424) instead of passing them straight through; by default on
            where dim is greater than 1.
        sync_codebook: of the processes of a distributed run; True is not supported yet.
        ema_update: codes follow the moving averages; by default if they are not learnable.
        manual_ema_update: they do so only when `_codebook.update_ema()` is called.
        learnable_codebook: codes are a parameter, trained by the loss.
        return_zeros_for_masked_padding: masked positions are 0, otherwise the input.
        route_gradients_to_input: pass the gradient of the output to the input.

    Arguments of upstream that are not listed have to keep their defaults. As in upstream, k-means takes the first
    batch in whatever mode; a first batch without a valid row leaves codes random.

    Raises:
        NotImplementedError: an argument asks for what this layer does not do yet.
        ValueError: arguments contradict each other or are out of range.
    """

    codebook_class = Codebook

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., Any] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
    ) -> None:
        super().__init__()
        _checks.check_unsupported(
            commitment_use_cross_entropy_loss=(commitment_use_cross_entropy_loss, False),
            orthogonal_reg_weight=(orthogonal_reg_weight, 0.0),
            orthogonal_reg_active_codes_only=(orthogonal_reg_active_codes_only, False),
            orthogonal_reg_max_codes=(orthogonal_reg_max_codes, None),
            codebook_diversity_loss_weight=(codebook_diversity_loss_weight, 0.0),
            codebook_diversity_temperature=(codebook_diversity_temperature, 100.0),
            stochastic_sample_codes=(stochastic_sample_codes, False),
            sample_codebook_temp=(sample_codebook_temp, 1.0),
            straight_through=(straight_through, False),
            directional_reparam=(directional_reparam, False),
            directional_reparam_variance=(directional_reparam_variance, 5e-3),
            sync_affine_param=(sync_affine_param, False),
            vq_bridge=(vq_bridge, None),
            in_place_codebook_optimizer=(in_place_codebook_optimizer, None),
            manual_in_place_optimizer_update=(manual_in_place_optimizer_update, False),
            affine_param=(affine_param, False),
            affine_param_batch_decay=(affine_param_batch_decay, 0.99),
            affine_param_codebook_decay=(affine_param_codebook_decay, 0.9),
            sync_update_v=(sync_update_v, 0.0),
        )
        _checks.check_single_process(sync_codebook)
        codebook_dim = dim if codebook_dim is None else codebook_dim
        learnable_codebook = bool(learnable_codebook)
        ema_update = not learnable_codebook if ema_update is None else ema_update
        _checks.check_sizes(dim=dim, codebook_size=codebook_size, codebook_dim=codebook_dim, heads=heads)
        _checks.check_numbers(
            low=0,
            eps=eps,
            kmeans_iters=kmeans_iters,
            threshold_ema_dead_code=threshold_ema_dead_code,
            commitment_weight=commitment_weight,
        )
        _checks.check_numbers(low=0, high=1, decay=decay)
        _checks.check_at_most_one(learnable_codebook=learnable_codebook, ema_update=ema_update)
        _checks.check_at_most_one(learnable_codebook=learnable_codebook, use_cosine_sim=use_cosine_sim)
        _checks.check_at_most_one(accept_image_fmap=accept_image_fmap, accept_3d_fmap=accept_3d_fmap)

        self.dim = dim
        self.codebook_size = codebook_size
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.eps = eps
        self.freeze_codebook = freeze_codebook
        self.use_cosine_sim = use_cosine_sim
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.commitment_weight = commitment_weight
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.learnable_codebook = learnable_codebook
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input

        inner_dim = codebook_dim * heads
        self.has_projections = inner_dim != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner_dim)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner_dim))
            self.project_out = nn.Linear(inner_dim, dim)
        self._codebook = self.codebook_class(
            codebook_dim,
            codebook_size,
            heads if separate_codebook_per_head else 1,
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            use_cosine_sim=use_cosine_sim,
            threshold_ema_dead_code=threshold_ema_dead_code,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            learnable_codebook=learnable_codebook,
        )

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable[..., Any] | None = None,
        ema_update_weight: Any = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        return_statistics: bool = False,
    ) -> tuple[Any, ...]:
        """Quantizes with the codes as they are; in training it then updates them and replaces dead ones.

        Args:
            x: [B, N, dim] or [B, dim], [B, dim, N] without channel_last, or the feature map the layer accepts;
                float32, float64, bfloat16 or float16.
            indices: not supported yet.
            mask: bool [B, N]; positions where it is False take no part and get index -1.
            lens: int64 or int32 [B], as a mask of the first positions of each sequence; less than 0 counts as 0,
                more than N as N.
            topk: not supported yet.
            sample_codebook_temp: not supported yet.
            freeze_codebook: overrides the layer's option for this call.
            return_loss_breakdown: also return a `LossBreakdown`.
            codebook_transform_fn: not supported yet.
            ema_update_weight: not supported yet.
            accum_ema_update: not supported yet.
            ema_update: overrides the layer's option for this call.
            return_statistics: also return a `CodeUsage`.

        Returns:
            quantized: the shape and dtype of x.
            indices: int64, the shape of x without its channels, and [..., heads] with several heads; -1 where masked or
                invalid.
            loss: float32 scalar; 0 in evaluation.
            Behind them what the return_* arguments ask for.

        Raises:
            NotImplementedError: an argument asks for what this layer does not do yet.
            TypeError: an argument has an unexpected type or dtype.
            ValueError: shapes do not fit, or arguments contradict each other.
        """
        _checks.check_unsupported(
            indices=(indices, None),
            topk=(topk, None),
            sample_codebook_temp=(sample_codebook_temp, None),
            codebook_transform_fn=(codebook_transform_fn, None),
            ema_update_weight=(ema_update_weight, None),
            accum_ema_update=(accum_ema_update, False),
        )
        ema_update = self.ema_update if ema_update is None else ema_update
        if ema_update and self.learnable_codebook:
            raise ValueError("ema_update: expected False with a learnable codebook, got True")
        freeze_codebook = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        tokens = self._tokens(x)
        mask = _checks.sequence_mask(x, tokens.shape[:2], mask, lens)
        # Padding may hold anything: zeros keep it out of the gradients of project_in and of the normalisation.
        z = self.project_in(tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0))
        rows = self._rows(z)
        gradient = "none"
        if not self.training:
            rows = rows.detach()
        elif rows.requires_grad and self.route_gradients_to_input:
            gradient = "rotation" if self.rotation_trick else "straight_through"
        device_type = "cpu" if x.is_meta else x.device.type  # meta has no autocast
        with torch.autocast(device_type, enabled=False):
            quantized, codes, commitment, counts = self._codebook(
                rows,
                mask=None if mask is None else self._mask_rows(mask),
                gradient=gradient,
                with_loss=self.training and self.commitment_weight > 0,
                freeze=freeze_codebook,
                ema_update=ema_update,
                statistics=return_statistics,
            )
        quantized = self.project_out(self._from_rows(quantized, z.shape).to(z.dtype)).to(x.dtype)
        if mask is not None:
            padding = torch.zeros_like(tokens) if self.return_zeros_for_masked_padding else tokens
            quantized = torch.where(mask.unsqueeze(-1), quantized, padding)
        quantized = (quantized.mT if self._channels_first(x) else quantized).reshape(x.shape)

        commitment = commitment.float()
        indices = self._from_rows(codes, self._indices_shape(x))
        results: list[Any] = [quantized, indices, commitment * self.commitment_weight]
        if return_loss_breakdown:
            zero = torch.zeros_like(commitment)
            results.append(LossBreakdown(commitment, zero, zero, zero))
        if return_statistics:
            results.append(code_usage(counts if self.separate_codebook_per_head else counts.squeeze(0)))
        return tuple(results)

    @property
    def ema_update(self) -> bool:
        """Whether codes follow the moving averages."""
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codes, float32 [K, D], or [H, K, D] with separate_codebook_per_head. Can be set."""
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed.squeeze(0)

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        if codes.shape != self.codebook.shape:
            raise ValueError(f"codebook: expected shape {list(self.codebook.shape)}, got {list(codes.shape)}")
        self._codebook.set_codes_(codes.reshape(self._codebook.embed.shape))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes that indices of `forward` stand for, before project_out: channels where the input has them.

        Heads are side by side in the channels. Index -1 gives zeros.
        """
        return self._channels_to_place(self._lookup(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returns as quantized for these indices; zeros where all heads have index -1."""
        dtype = next(self.project_out.parameters(), self._codebook.embed).dtype
        output = self.project_out(self._lookup(indices).to(dtype))
        absent = indices < 0
        if self.heads > 1:
            absent = absent.all(-1)
        return self._channels_to_place(output.masked_fill(absent.unsqueeze(-1), 0))

    @torch.no_grad()
    def expire_codes_(self, x: Tensor) -> None:
        """In training, replaces dead codes by vectors of x, which is as `forward` takes it."""
        self._codebook.expire_codes_(self._rows(self.project_in(self._tokens(x))))

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Updates the codebook as a training step does, with the indices of x chosen elsewhere.

        Args:
            x: as `forward` takes it.
            indices: as `forward` returns them; -1 counts for no code.
            mask: bool [B, N]; positions where it is False take no part.
        """
        tokens = self._tokens(x)
        mask = _checks.sequence_mask(x, tokens.shape[:2], mask, None)
        _checks.check_indices(indices)
        _checks.check_shape("indices", indices, self._indices_shape(x), "x", x)
        _checks.check_index_range(indices, self.codebook_size)
        index_rows = self._rows(indices.reshape(*tokens.shape[:2], self.heads)).squeeze(-1)
        mask_rows = None if mask is None else self._mask_rows(mask)
        self._codebook.update_indices(self._rows(self.project_in(tokens)), index_rows.to(torch.int64), mask_rows)

    update_ema_indices = update_indices

    def _channels_first(self, x: Tensor) -> bool:
        return x.ndim > 2 and (not self.channel_last or self.accept_image_fmap or self.accept_3d_fmap)

    def _tokens(self, x: Tensor) -> Tensor:
        """Checks x and brings it to [B, N, dim]."""
        _checks.check_tensor("x", x, _checks.FLOAT_TYPES)
        if self.accept_3d_fmap:
            layouts = [f"[B, {self.dim}, D, H, W]"]
        elif self.accept_image_fmap:
            layouts = [f"[B, {self.dim}, H, W]"]
        else:
            layouts = [f"[B, N, {self.dim}]" if self.channel_last else f"[B, {self.dim}, N]", f"[B, {self.dim}]"]
        channels_first = self._channels_first(x)
        _checks.check_input(x, layouts, self.dim, 1 if channels_first else -1)
        if channels_first:
            return x.flatten(2).mT
        return x.unsqueeze(1) if x.ndim == 2 else x

    def _rows(self, t: Tensor) -> Tensor:
        """[B, N, heads * W] to the rows [C, M, W] of each codebook."""
        t = t.reshape(t.shape[0] * t.shape[1], self.heads, t.shape[-1] // self.heads)
        return t.transpose(0, 1) if self.separate_codebook_per_head else t.flatten(0, 1).unsqueeze(0)

    def _from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        return (rows.transpose(0, 1) if self.separate_codebook_per_head else rows).reshape(shape)

    def _mask_rows(self, mask: Tensor) -> Tensor:
        return self._rows(mask.unsqueeze(-1).expand(-1, -1, self.heads)).squeeze(-1)

    def _indices_shape(self, x: Tensor) -> torch.Size:
        positions = x.shape[:1] + (x.shape[2:] if self._channels_first(x) else x.shape[1:-1])
        return torch.Size((*positions, self.heads)) if self.heads > 1 else positions

    def _lookup(self, indices: Tensor) -> Tensor:
        """Codes [..., heads * D] of indices [...], or [..., heads] with several heads."""
        _checks.check_indices(indices)
        if self.heads > 1 and (indices.ndim == 0 or indices.shape[-1] != self.heads):
            raise ValueError(f"indices: expected shape [..., {self.heads}], got {list(indices.shape)}")
        codebooks, codes, _ = self._codebook.embed.shape
        if self.heads == 1:
            indices = indices.unsqueeze(-1)
        _checks.check_index_range(indices, codes)
        rows = indices.clamp(0, codes - 1) + codes * torch.arange(codebooks, device=indices.device)
        vectors = F.embedding(rows, self._codebook.embed.flatten(0, 1))
        # Where the range could not be checked, NaN shows what is out of it.
        vectors = vectors.masked_fill((indices >= codes).unsqueeze(-1), torch.nan)
        return vectors.masked_fill((indices < 0).unsqueeze(-1), 0).flatten(-2)

    def _channels_to_place(self, vectors: Tensor) -> Tensor:
        return vectors.movedim(-1, 1) if self._channels_first(vectors) else vectors
