"""The codebook of a vector quantizer: how rows choose their codes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqkernels.reference import synchronization
from vqkernels.reference._copies import own_copy
from vqkernels.reference.affine import to_batch, to_codebook, update_affine_
from vqkernels.reference.codebook_state import CodebookState, CodeUpdate, Weight, normalize
from vqkernels.reference.distances import choose_codes, soft_codes
from vqkernels.reference.kmeans import kmeans
from vqkernels.reference.selection import quantize_selected
from vqkernels.reference.topk_codes import topk_codes
from vqkernels.reference.vector_quantize import vector_quantize

__all__ = ["CodeUpdate", "Codebook", "CodebookState", "Quantization", "Weight", "normalize"]


class Quantization(NamedTuple):
    """What a codebook makes of rows; with top k codes, there are k in place of one."""

    quantized: Tensor  # [C, M, D] or [C, M, k, D]
    indices: Tensor  # int64 [C, M] or [C, M, k]
    error: Tensor  # mean squared difference from the rows, 0 if not asked for; with top k one for every code
    counts: Tensor | None  # int64 [C, K], by the first of top k codes; None if not asked for
    rows: Tensor  # [C, M, D] as they met the codes
    codes: Tensor  # [C, K, D] as they met the rows, or [C, M, K, D] where transformed


class Codebook(CodebookState):
    """The codes of `CodebookState`, and how rows choose one.

    Buffers with affine parameters:
        batch_mean, batch_variance: [C, 1, D], averages of the rows; None before the first training step.
        codebook_mean, codebook_variance: [C, 1, D], averages of the codes.
        codebook_mean_needs_init, codebook_variance_needs_init: bool [], True before the first training step.
    """

    vector_quantize: Callable[..., Any] = staticmethod(vector_quantize)
    topk_codes: Callable[..., Any] = staticmethod(topk_codes)

    batch_mean: Tensor | None
    batch_variance: Tensor | None
    codebook_mean_needs_init: Tensor
    codebook_mean: Tensor
    codebook_variance_needs_init: Tensor
    codebook_variance: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int,
        *,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        directional_reparam_variance: float = 5e-3,
        vq_bridge: nn.Module | None = None,
        affine_param: bool = False,
        sync_affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        **state: Any,
    ) -> None:
        super().__init__(dim, codebook_size, num_codebooks, **state)
        self.stochastic_sample_codes = stochastic_sample_codes
        self.sample_codebook_temp = sample_codebook_temp
        self.straight_through = straight_through
        self.directional_reparam_variance = directional_reparam_variance
        self.vq_bridge = vq_bridge
        self.affine_param = affine_param
        self.sync_affine_param = sync_affine_param
        self.affine_param_batch_decay = affine_param_batch_decay
        self.affine_param_codebook_decay = affine_param_codebook_decay
        if affine_param:
            self.register_buffer("batch_mean", None)
            self.register_buffer("batch_variance", None)
            self.register_buffer("codebook_mean_needs_init", torch.tensor(True))
            self.register_buffer("codebook_mean", torch.zeros(num_codebooks, 1, dim))
            self.register_buffer("codebook_variance_needs_init", torch.tensor(True))
            self.register_buffer("codebook_variance", torch.ones(num_codebooks, 1, dim))

    def forward(
        self,
        rows: Tensor,
        *,
        mask: Tensor | None,
        gradient: str,
        with_loss: bool,
        learn: bool,
        freeze: bool,
        ema_update: bool,
        statistics: bool = False,
        update: bool = True,
        weight: Weight = None,
        accumulate: bool = False,
        temperature: float | None = None,
        topk: int | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> Quantization:
        """Quantizes with the codes as they are, then, in training, updates them.

        Args:
            rows: [C, M, D].
            mask: bool [C, M] or None; rows where it is False take no part.
            gradient: see `quantize_selected`.
            with_loss: compute the error, whose gradient goes to the rows.
            learn: and to the codes, where they are a parameter.
            freeze: leave the codebook alone, and give it no gradient.
            ema_update: let codes follow the statistics.
            statistics: return counts.
            update: change the codes after the step.
            weight: see `step_`.
            accumulate: see `step_`.
            temperature: of sampling and of soft codes, in training; that of the codebook by default.
            topk: choose the k best codes of a row; codes are not updated.
            transform: makes the codes of every row, [C, M, K, D], from those of the codebook.
        """
        rows = self.transform_input(rows)
        update = update and self.training and not freeze and topk is None and (ema_update or self.replaces_dead_codes)
        if update:
            self.begin_step_()
        else:
            self.finish_pending_()
        self.init_embed_(rows, mask)
        if self.affine_param and self.training:
            update_affine_(self, rows, self.valid_rows(rows, mask))
        codes = self.search_codes(freeze, copy=update)  # the backward pass reads what the update overwrites
        temperature = self.sample_codebook_temp if temperature is None else temperature
        random = self.training and temperature > 0
        samples = random and self.stochastic_sample_codes
        softens = random and self.straight_through and gradient == "none"
        counts: Any = None
        sums: Any = None
        if samples or softens or topk is not None or transform is not None or gradient == "directional":
            wide = torch.promote_types(rows.dtype, codes.dtype)
            codes = codes.to(wide) if transform is None else self.transform_input(transform(codes)).to(wide)
            valid = self.valid_rows(rows, mask)
            finite = torch.where(valid.unsqueeze(-1), rows, 0).to(wide)
            if samples or transform is not None:
                drawn = temperature if samples else None
                indices = choose_codes(finite, codes, cosine=self.use_cosine_sim, temperature=drawn, topk=topk)
                indices = indices.masked_fill(~(valid if topk is None else valid.unsqueeze(-1)), -1)
            elif topk is not None:
                indices, _ = self.topk_codes(rows.detach(), codes.detach(), topk, metric=self.metric, mask=mask)
            else:
                indices = self.nearest_code(rows, codes, metric=self.metric, mask=mask)
            soft = None
            if softens:
                soft = soft_codes(finite, codes, cosine=self.use_cosine_sim, temperature=temperature)
            quantized, error = quantize_selected(
                rows,
                codes,
                indices,
                mask=mask,
                gradient=gradient,
                learn=learn,
                soft=soft,
                variance=self.directional_reparam_variance,
            )
        else:
            learn = learn and codes.requires_grad
            quantized, indices, error, counts, sums = self.vector_quantize(
                rows,
                codes,
                metric=self.metric,
                mask=mask,
                gradient=gradient,
                commitment_weight=float(with_loss),
                codebook_weight=float(with_loss and learn),
                statistics=(update or statistics) and not self.affine_param,
            )
            if with_loss and learn:
                error = error - error.detach() / 2  # both terms have the same value, which counts once
        if not with_loss and topk is None:
            error = torch.zeros_like(error)
        if update or statistics:
            followed = self._followed(rows)
            if counts is None:
                first = indices if topk is None else indices[..., 0]
                counts, sums = self.code_statistics(followed, first, self.codebook_size, heads=True)
            if update:
                self.step_(followed, indices, counts, sums, ema_update=ema_update, weight=weight, accumulate=accumulate)
        return Quantization(quantized, indices, error, counts, rows, codes)

    def search_codes(self, freeze: bool = False, copy: bool = False) -> Tensor:
        """The codes [C, K, D] as rows meet them, without a gradient if frozen; or a copy, which updates leave alone."""
        codes = own_copy(self.embed) if copy else self.embed
        if self.vq_bridge is not None:
            codes = self.vq_bridge(codes)
            if codes.shape != self.embed.shape:
                raise ValueError(
                    f"vq_bridge: expected codes of shape {list(self.embed.shape)}, got {list(codes.shape)}"
                )
        if self.affine_param:
            codes = to_batch(self, codes)
        return codes.detach() if freeze else codes

    def _followed(self, rows: Tensor) -> Tensor:
        """Rows [C, M, D] as the codes follow them."""
        return to_codebook(self, rows.detach()) if self.affine_param else rows

    @torch.no_grad()
    def init_embed_(self, rows: Tensor, mask: Tensor | None = None) -> None:
        """Replaces codes by the k-means centres of the rows, unless they were initialised before.

        The first call with rows decides: if none of them is valid, codes stay as random as they are.
        """
        if self._may_need_init and self.sync_codebook:
            # A state may have come from another process, and all of them have to decide alike.
            self._may_need_init = not bool(self.initted)
        if not self._may_need_init or (rows.shape[1] == 0 and not self.sync_codebook):
            return
        self._may_need_init = False
        means, counts, possible = kmeans(self, rows, mask)
        # An empty cluster keeps its centre with the weight of one row: without any, it would decay to the zero vector.
        cluster_size = counts.clamp(min=1).to(torch.float32)
        use = possible & ~self.initted
        self.cluster_size.copy_(torch.where(use, cluster_size, self.cluster_size))
        use = use.unsqueeze(-1)
        self.embed_avg.copy_(torch.where(use, means * cluster_size.unsqueeze(-1), self.embed_avg))
        self.embed.copy_(torch.where(use, means, self.embed))
        self.initted.logical_or_(possible.any())
        if self.sync_codebook and not self.sync_kmeans:
            synchronization.broadcast_state(self)

    @torch.no_grad()
    def update_indices(self, rows: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Updates the codes with rows [C, M, D] and the codes [C, M] that they are to count for, -1 for none."""
        if not self.ema_update and not self.replaces_dead_codes:
            return
        rows = self._followed(self.transform_input(rows))
        self.begin_step_()
        indices = torch.where(self.valid_rows(rows, mask), indices, -1)
        counts, sums = self.code_statistics(rows, indices, self.codebook_size, heads=True)
        self.step_(rows, indices, counts, sums, ema_update=self.ema_update)

    def expire_codes_(self, rows: Tensor) -> None:
        """In training, replaces codes whose cluster size is below the threshold by distinct random valid rows."""
        super().expire_codes_(self._followed(rows))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.affine_param:
            for name in ("batch_mean", "batch_variance"):
                setattr(self, name, torch.empty_like(self.codebook_mean) if prefix + name in state_dict else None)
        super()._load_from_state_dict(state_dict, prefix, *args)
