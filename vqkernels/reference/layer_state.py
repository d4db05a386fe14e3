"""What a quantizer layer is made of, and what can be done with its codes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.reference import _checks, synchronization
from vqkernels.reference.codebook import Codebook
from vqkernels.reference.layouts import Layout
from vqkernels.reference.losses import mean_over


class LayerState(nn.Module):
    """Options, modules and codes of `VectorQuantize`, which describes the arguments."""

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
        reproducible: bool = False,
    ) -> None:
        super().__init__()
        codebook_dim = dim if codebook_dim is None else codebook_dim
        if learnable_codebook is None:
            learnable_codebook = directional_reparam or vq_bridge is not None
        if ema_update is None:
            ema_update = not learnable_codebook
        if rotation_trick is None:
            rotation_trick = dim > 1 and not straight_through and not directional_reparam
        if sync_codebook is None:
            sync_codebook = synchronization.is_distributed()
        _checks.check_sizes(dim=dim, codebook_size=codebook_size, codebook_dim=codebook_dim, heads=heads)
        if orthogonal_reg_max_codes is not None:
            _checks.check_sizes(orthogonal_reg_max_codes=orthogonal_reg_max_codes)
        _checks.check_numbers(
            low=0,
            eps=eps,
            kmeans_iters=kmeans_iters,
            threshold_ema_dead_code=threshold_ema_dead_code,
            commitment_weight=commitment_weight,
            orthogonal_reg_weight=orthogonal_reg_weight,
            codebook_diversity_loss_weight=codebook_diversity_loss_weight,
            codebook_diversity_temperature=codebook_diversity_temperature,
            sample_codebook_temp=sample_codebook_temp,
            directional_reparam_variance=directional_reparam_variance,
        )
        _checks.check_numbers(
            low=0,
            high=1,
            decay=decay,
            affine_param_batch_decay=affine_param_batch_decay,
            affine_param_codebook_decay=affine_param_codebook_decay,
            sync_update_v=sync_update_v,
        )
        _checks.check_at_most_one(learnable_codebook=learnable_codebook, ema_update=ema_update)
        _checks.check_at_most_one(learnable_codebook=learnable_codebook, use_cosine_sim=use_cosine_sim)
        _checks.check_at_most_one(learnable_codebook=learnable_codebook, straight_through=straight_through)
        _checks.check_at_most_one(affine_param=affine_param, use_cosine_sim=use_cosine_sim)
        _checks.check_at_most_one(accept_image_fmap=accept_image_fmap, accept_3d_fmap=accept_3d_fmap)
        _checks.check_at_most_one(
            straight_through=straight_through, rotation_trick=rotation_trick, directional_reparam=directional_reparam
        )
        is_parameter = learnable_codebook or orthogonal_reg_weight > 0
        _checks.check_needs("directional_reparam", directional_reparam, threshold_ema_dead_code=threshold_ema_dead_code)
        _checks.check_needs("vq_bridge", vq_bridge is not None, learnable_codebook=learnable_codebook)
        _checks.check_needs("sync_update_v", sync_update_v > 0, learnable_codebook=learnable_codebook)
        _checks.check_needs(
            "in_place_codebook_optimizer", in_place_codebook_optimizer is not None, learnable_codebook=is_parameter
        )

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
        self.has_commitment_loss = commitment_weight > 0 and not directional_reparam
        self.commitment_weight = commitment_weight
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.has_codebook_orthogonal_loss = orthogonal_reg_weight > 0
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.has_codebook_diversity_loss = codebook_diversity_loss_weight > 0
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.rotation_trick = rotation_trick
        self.directional_reparam = directional_reparam
        self.learnable_codebook = learnable_codebook
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.sync_update_v = sync_update_v
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input
        self.layout = Layout(dim, heads, separate_codebook_per_head, channel_last, accept_image_fmap, accept_3d_fmap)

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
            learnable_codebook=is_parameter,
            sync_codebook=sync_codebook,
            sync_kmeans=sync_kmeans,
            reproducible=reproducible,
            stochastic_sample_codes=stochastic_sample_codes,
            sample_codebook_temp=sample_codebook_temp,
            straight_through=straight_through,
            directional_reparam_variance=directional_reparam_variance,
            vq_bridge=vq_bridge,
            affine_param=affine_param,
            sync_affine_param=sync_affine_param,
            affine_param_batch_decay=affine_param_batch_decay,
            affine_param_codebook_decay=affine_param_codebook_decay,
        )
        self.in_place_codebook_optimizer: Any = None
        if in_place_codebook_optimizer is not None:
            self.in_place_codebook_optimizer = in_place_codebook_optimizer(self._codebook.parameters())

    @classmethod
    def from_codebook(cls, codes: Tensor, **options: Any) -> "LayerState":
        """A layer with given codes, on their device.

        Args:
            codes: [K, D], or [H, K, D] for a codebook for each of H heads.
            options: arguments of the constructor beside the sizes of the codes; dim is D or H D by default.
        """
        _checks.check_tensor("codes", codes, _checks.FLOAT_TYPES)
        if codes.ndim not in (2, 3):
            raise ValueError(f"codes: expected shape [K, D] or [H, K, D], got {list(codes.shape)}")
        size, width = codes.shape[-2:]
        if codes.ndim == 3:
            options = {"heads": codes.shape[0], "separate_codebook_per_head": True, **options}
        options = {"dim": width * options.get("heads", 1), **options}
        layer = cls(codebook_size=size, codebook_dim=width, **options).to(codes.device)
        layer.codebook = layer._codebook.transform_input(codes.detach())
        return layer

    @property
    def ema_update(self) -> bool:
        """Whether codes follow the moving averages."""
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codes, float32 [K, D], or [H, K, D] with separate_codebook_per_head. Set it in all processes alike."""
        self._codebook.finish_pending_()
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
        return self.layout.channels_to_place(self._lookup(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returns as quantized for these indices; zeros where all heads have index -1."""
        dtype = next(self.project_out.parameters(), self._codebook.embed).dtype
        output = self.project_out(self._lookup(indices).to(dtype))
        absent = indices < 0
        if self.heads > 1:
            absent = absent.all(-1)
        return self.layout.channels_to_place(output.masked_fill(absent.unsqueeze(-1), 0))

    @torch.no_grad()
    def expire_codes_(self, x: Tensor) -> None:
        """In training, replaces dead codes by vectors of x, which is as `forward` takes it."""
        self._codebook.expire_codes_(self.layout.rows(self.project_in(self.layout.tokens(x))))

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Updates the codebook as a training step does, with the indices of x chosen elsewhere.

        Args:
            x: as `forward` takes it.
            indices: as `forward` returns them; -1 counts for no code.
            mask: bool [B, N]; positions where it is False take no part.
        """
        tokens = self.layout.tokens(x)
        mask = _checks.sequence_mask(x, tokens.shape[:2], mask, None)
        _checks.check_indices(indices)
        _checks.check_shape("indices", indices, self.layout.indices_shape(x), "x", x)
        _checks.check_index_range(indices, self.codebook_size)
        index_rows = self.layout.index_rows(indices, tokens)
        mask_rows = None if mask is None else self.layout.mask_rows(mask)
        self._codebook.update_indices(self.layout.rows(self.project_in(tokens)), index_rows, mask_rows)

    update_ema_indices = update_indices

    def apply_statistics_(self) -> None:
        """The training step of all batches that were given with accum_ema_update; nothing where there are none."""
        self._codebook.apply_statistics_()

    def update_in_place_optimizer(self) -> None:
        """Takes a step with the gradient of the codebook, as in_place_codebook_optimizer does in forward."""
        if self.in_place_codebook_optimizer is None:
            return
        if self._codebook.sync_codebook:
            gradients = [p.grad for p in self._codebook.parameters() if p.grad is not None]
            mean_over(gradients, self._codebook.process_group)
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()

    def _lookup(self, indices: Tensor) -> Tensor:
        """Codes [..., heads * D] of indices [...], or [..., heads] with several heads."""
        _checks.check_indices(indices)
        if self.heads > 1 and (indices.ndim == 0 or indices.shape[-1] != self.heads):
            raise ValueError(f"indices: expected shape [..., {self.heads}], got {list(indices.shape)}")
        self._codebook.finish_pending_()
        codebook = self._codebook.search_codes()
        codebooks, codes, _ = codebook.shape
        if self.heads == 1:
            indices = indices.unsqueeze(-1)
        _checks.check_index_range(indices, codes)
        rows = indices.clamp(0, codes - 1) + codes * torch.arange(codebooks, device=indices.device)
        vectors = F.embedding(rows, codebook.flatten(0, 1))
        # Where the range could not be checked, NaN shows what is out of it.
        vectors = vectors.masked_fill((indices >= codes).unsqueeze(-1), torch.nan)
        return vectors.masked_fill((indices < 0).unsqueeze(-1), 0).flatten(-2)
