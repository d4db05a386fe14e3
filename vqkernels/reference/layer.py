"""The quantizer layer, with the interface of vector-quantize-pytorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqkernels.reference import _checks
from vqkernels.reference.codebook import Quantization
from vqkernels.reference.codebook_state import Weight
from vqkernels.reference.distances import cross_entropy, negative_entropy
from vqkernels.reference.layer_results import LossBreakdown, code_usage
from vqkernels.reference.layer_state import LayerState
from vqkernels.reference.losses import orthogonal_loss


class VectorQuantize(LayerState):
    """Replaces vectors by their nearest code, and trains the codes.

    Interface, defaults, results and state_dict are those of `VectorQuantize` in vector-quantize-pytorch 1.32. Beyond
    it: no step waits for the device or breaks a graph of torch.compile (except by an in-place optimizer, or where the
    codebook is synchronised or reproducible); the codebook is float32 under any dtype of the module and under autocast;
    a row with NaN or Inf gets index -1 and is NaN, and no other row, loss or code notices; nothing of size rows x codes
    is stored, except what codebook_transform_fn returns; in distributed training all codebooks share one collective
    (sync_affine_param adds two for each). Where upstream is at odds with itself, this layer differs:

    - the losses of a masked batch are those of its unmasked rows alone, whatever the options;
    - gradients of cross entropy, diversity and straight_through are those of the codes in use, which upstream has
      overwritten by then;
    - after k-means an empty cluster keeps its centre instead of becoming the zero vector;
    - the `codebook` setter also sets the statistics, so that the next EMA step does not undo it;
    - codes and outputs from indices are right for shared heads, channel-first layouts, affine parameters and a bridge,
      and 0 for index -1;
    - with `indices`, quantized has the shape of x;
    - project_in gets the gradient of the output even if x needs none;
    - a frozen codebook gets no gradient;
    - evaluation leaves the averages of affine parameters alone, and rows that replace dead codes are taken as the codes
      follow them;
    - ema_update is off by default if the codebook is learnable, rotation_trick if straight_through.

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
        kmeans_init: take the centres of the first batch as codes, in whatever mode; a first batch without a valid row
            leaves codes random.
        kmeans_iters: iterations of that.
        sync_kmeans: the first batch is that of all processes, where the codebook is synchronised.
        use_cosine_sim: normalise input and codes to length 1.
        layernorm_after_project_in: LayerNorm behind the projection, where there is one.
        threshold_ema_dead_code: codes with a smaller cluster size are replaced by rows of the batch; 0: never.
        channel_last: input is [B, N, dim], otherwise [B, dim, N].
        accept_image_fmap: input is [B, dim, H, W].
        accept_3d_fmap: input is [B, dim, D, H, W].
        commitment_weight: weight of the loss that draws the input to its codes.
        commitment_use_cross_entropy_loss: this loss is the cross entropy of the choice, with minus the distances (or
            the cosines) as logits, not the mean squared error.
        orthogonal_reg_weight: weight of the loss that makes codes orthogonal; makes the codebook a parameter.
        orthogonal_reg_active_codes_only: of the codes that the batch has chosen.
        orthogonal_reg_max_codes: of no more codes, drawn at random.
        codebook_diversity_loss_weight: weight of the loss that makes a position use many codes: minus the entropy of
            the average over the batch of softmax(temperature * logits).
        codebook_diversity_temperature: of that.
        stochastic_sample_codes: in training draw codes from softmax(logits / temperature).
        sample_codebook_temp: of that; 0: the nearest code.
        straight_through: in training, without gradients routed to the input, outputs have the gradient of the average
            of the codes by softmax(logits / temperature).
        rotation_trick: rotate gradients (arXiv 2410.06424) instead of passing them straight through; by default on
            where dim is greater than 1 and neither straight_through nor directional_reparam is asked for.
        directional_reparam: quantized vectors lie at the distance of the code, in its direction with some noise, and
            have the gradient of both (DiVeQ); there is no commitment loss.
        directional_reparam_variance: of the noise.
        sync_codebook: codes follow the rows of all processes of a distributed run; by default if there are several.
        sync_affine_param: affine parameters too.
        ema_update: codes follow the moving averages; by default if they are not learnable.
        vq_bridge: module that maps the codebook [H, K, D] to the codes in use.
        manual_ema_update: codes follow only when `_codebook.update_ema()` is called.
        learnable_codebook: codes are a parameter, trained by the loss; by default with directional_reparam or a bridge.
        in_place_codebook_optimizer: makes an optimizer of the parameters of the codebook; it takes a step in forward,
            before the batch is quantized.
        manual_in_place_optimizer_update: that step is taken by `update_in_place_optimizer()`.
        affine_param: move and scale codes to the mean and variance of the rows (arXiv 2305.08842).
        affine_param_batch_decay: of the averages of the rows.
        affine_param_codebook_decay: of the averages of the codes.
        sync_update_v: share by which the gradient of quantized vectors is increased (arXiv 2305.08842, equation 21).
        return_zeros_for_masked_padding: masked positions are 0, otherwise the input.
        route_gradients_to_input: pass the gradient of the output to the input.
        reproducible: codes are the same, bit for bit, for any distribution of the rows over processes.

    Raises:
        TypeError: an argument has an unexpected type.
        ValueError: arguments contradict each other or are out of range.
    """

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
        ema_update_weight: Weight = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        return_statistics: bool = False,
    ) -> tuple[Any, ...]:
        """Quantizes with the codes as they are; in training it then updates them and replaces dead ones.

        Args:
            x: [B, N, dim] or [B, dim], [B, dim, N] without channel_last, or the feature map the layer accepts;
                float32, float64, bfloat16 or float16.
            indices: int64 or int32 in the shape of the indices returned, or [B, N] ([B, N, heads]) for a feature map;
                codes of which the cross entropy is to be returned; -1 counts not.
            mask: bool [B, N]; positions where it is False take no part and get index -1.
            lens: int64 or int32 [B], as a mask of the first positions of each sequence; less than 0 counts as 0,
                more than N as N.
            topk: choose the k best codes of every vector, the best first; the codebook is not updated. One head only.
            sample_codebook_temp: overrides the layer's option for this call.
            freeze_codebook: overrides the layer's option for this call.
            return_loss_breakdown: also return a `LossBreakdown`.
            codebook_transform_fn: maps the codebook [H, K, D] to codes of every vector, [H, B, N, K, D] with H = 1
                unless heads have codebooks of their own; shared heads are part of B.
            ema_update_weight: weight of this step in the moving averages, [K] or [H, K], or a function of sums
                [H, K, D] and counts [H, K] that gives it.
            accum_ema_update: only add the statistics to those of the next step, or of `apply_statistics_`.
            ema_update: overrides the layer's option for this call.
            return_statistics: also return a `CodeUsage`.

        Returns:
            quantized: the shape and dtype of x; with topk [B, N, k, dim], otherwise k is last if channels are first.
            indices: int64, the shape of x without its channels, and [..., heads] with several heads, or [..., k] with
                topk; -1 where masked or invalid.
            loss: float32 scalar; 0 in evaluation. With topk the commitment loss of every index, in evaluation too.
            Behind them what the return_* arguments ask for.
            With `indices` instead: quantized, and the mean cross entropy of the softmax of minus the distances (or of
            the cosines) and these codes.

        Raises:
            TypeError: an argument has an unexpected type or dtype.
            ValueError: shapes do not fit, or arguments contradict each other.
        """
        layout, codebook = self.layout, self._codebook
        ema_update = self.ema_update if ema_update is None else ema_update
        if ema_update and self.learnable_codebook:
            raise ValueError("ema_update: expected False with a learnable codebook, got True")
        freeze_codebook = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        if topk is not None:
            topk = self._check_topk(topk)
        _checks.check_weight(ema_update_weight, codebook.cluster_size)
        tokens = layout.tokens(x)
        mask = _checks.sequence_mask(x, tokens.shape[:2], mask, lens)
        if indices is not None:
            self._check_targets(indices, x, tokens)
        # Padding may hold anything: zeros keep it out of the gradients of project_in and of the normalisation.
        z = self.project_in(tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0))
        rows = layout.rows(z)
        gradient = "none"
        if not self.training:
            if indices is None and topk is None:
                rows = rows.detach()
        elif rows.requires_grad and self.route_gradients_to_input:
            if self.rotation_trick:
                gradient = "rotation"
            else:
                gradient = "directional" if self.directional_reparam else "straight_through"
        options: dict[str, Any] = {
            "mask": None if mask is None else layout.mask_rows(mask),
            "freeze": freeze_codebook,
            "ema_update": ema_update,
            "weight": ema_update_weight,
            "accumulate": accum_ema_update,
            "temperature": sample_codebook_temp,
            "topk": topk,
        }
        if codebook_transform_fn is not None:
            transform = codebook_transform_fn
            options["transform"] = lambda codes: layout.transformed_rows(transform(codes), tokens)
        zero = torch.zeros((), dtype=torch.float32, device=x.device)
        in_place_loss = zero
        device_type = "cpu" if x.is_meta else x.device.type  # meta has no autocast
        with torch.autocast(device_type, enabled=False):
            if self.in_place_codebook_optimizer is not None and self.training and not freeze_codebook:
                in_place_loss = self._optimize_in_place(rows, options)
                options["update"] = False
            result: Quantization = codebook(
                rows,
                gradient=gradient,
                with_loss=self.training and self.has_commitment_loss and not self.commitment_use_cross_entropy_loss,
                learn=self.learnable_codebook and not freeze_codebook,
                statistics=return_statistics or (self.training and self.orthogonal_reg_active_codes_only),
                **options,
            )
            quantized = result.quantized
            if self.training and self.sync_update_v > 0:
                quantized = quantized + self.sync_update_v * (quantized - quantized.detach())
            if indices is not None:
                loss = self._cross_entropy(result, layout.index_rows(indices, tokens))
            else:
                loss, parts = self._losses(result, tokens, in_place_loss)

        more = () if topk is None else (topk,)
        quantized = layout.from_rows(quantized, torch.Size((*z.shape[:-1], *more, z.shape[-1])))
        quantized = self.project_out(quantized.to(z.dtype)).to(x.dtype)
        if mask is not None:
            absent = ~(mask.unsqueeze(-1) if topk is None else mask[..., None, None])
            padding = 0 if self.return_zeros_for_masked_padding else tokens if topk is None else tokens.unsqueeze(2)
            quantized = torch.where(absent, padding, quantized)
        quantized = layout.output(quantized, x)
        if indices is not None:
            return quantized, loss

        shape = torch.Size((*layout.indices_shape(x), *more))
        results: list[Any] = [quantized, layout.from_rows(result.indices, shape), _per_index(loss, shape)]
        if return_loss_breakdown:
            results.append(parts._replace(commitment=_per_index(parts.commitment, shape)))
        if return_statistics:
            counts = result.counts
            assert counts is not None
            results.append(code_usage(counts if self.separate_codebook_per_head else counts.squeeze(0)))
        return tuple(results)

    def _check_topk(self, topk: int) -> int:
        _checks.check_sizes(topk=topk)
        if self.heads > 1:
            raise ValueError(f"topk: expected only with one head, got {self.heads} heads")
        if self.training and self.commitment_use_cross_entropy_loss:
            raise ValueError("topk: expected only without commitment_use_cross_entropy_loss in training")
        if self.training and self.in_place_codebook_optimizer is not None:
            raise ValueError("topk: expected only without in_place_codebook_optimizer in training")
        return min(topk, self.codebook_size)

    def _check_targets(self, indices: Tensor, x: Tensor, tokens: Tensor) -> None:
        _checks.check_indices(indices)
        flat = (*tokens.shape[:2], self.heads) if self.heads > 1 else tokens.shape[:2]
        if indices.shape != flat:
            _checks.check_shape("indices", indices, self.layout.indices_shape(x), "x", x)
        _checks.check_device("indices", indices, "x", x)
        _checks.check_index_range(indices, self.codebook_size)

    def _optimize_in_place(self, rows: Tensor, options: dict[str, Any]) -> Tensor:
        """Moves the codes to the rows by a step of their optimizer, or leaves it the gradient; returns the loss."""
        with torch.enable_grad():
            rows = rows.detach()
            error = self._codebook(rows, gradient="none", with_loss=True, learn=True, **options).error
            error.backward()
        if not self.manual_in_place_optimizer_update:
            self.update_in_place_optimizer()
        return error.detach().float()

    def _losses(self, result: Quantization, tokens: Tensor, in_place: Tensor) -> tuple[Tensor, LossBreakdown]:
        """The weighted sum of the losses, and its parts: scalars, or of the shape of the indices with top k codes."""
        zero = torch.zeros_like(in_place)
        commitment = diversity = orthogonal = zero
        per_code = result.indices.ndim == 3
        if self.training and self.has_commitment_loss and self.commitment_use_cross_entropy_loss:
            commitment = self._cross_entropy(result, result.indices)
        elif self.has_commitment_loss or not self.training:
            commitment = result.error.float()
        weight = self.commitment_weight if self.has_commitment_loss else 1.0
        if not self.training:
            return commitment * weight, LossBreakdown(commitment, zero, zero, zero)

        loss = commitment * weight
        if self.has_codebook_diversity_loss:
            valid = result.indices >= 0
            valid = valid[..., 0] if per_code else valid
            diversity = negative_entropy(
                torch.where(valid.unsqueeze(-1), result.rows, 0).to(result.codes.dtype),
                result.codes,
                valid,
                self.layout.positions(tokens),
                cosine=self.use_cosine_sim,
                temperature=self.codebook_diversity_temperature,
            ).float()
            loss = loss + diversity * self.codebook_diversity_loss_weight
        if self.has_codebook_orthogonal_loss:
            # Synchronised codes may be on their way, others may change before the backward pass.
            self._codebook.finish_pending_()
            active = None
            if self.orthogonal_reg_active_codes_only:
                assert result.counts is not None
                active = result.counts > 0
            codes = self._codebook.embed.clone()
            orthogonal = orthogonal_loss(codes, active=active, max_codes=self.orthogonal_reg_max_codes)
            loss = loss + orthogonal * self.orthogonal_reg_weight
        if torch.is_grad_enabled() and not loss.requires_grad and not torch.compiler.is_compiling():
            loss.requires_grad_()  # so that backward may be called whatever the input
        return loss, LossBreakdown(commitment, diversity, orthogonal, in_place)

    def _cross_entropy(self, result: Quantization, targets: Tensor) -> Tensor:
        """Of the choice and the targets [C, M]; rows without a code count not."""
        chosen = result.indices >= 0
        chosen = chosen[..., 0] if chosen.ndim == 3 else chosen
        rows = torch.where(chosen.unsqueeze(-1), result.rows, 0).to(result.codes.dtype)
        targets = torch.where(chosen, targets, -1)
        return cross_entropy(rows, result.codes, targets, cosine=self.use_cosine_sim).float()


def _per_index(loss: Tensor, shape: torch.Size) -> Tensor:
    """The loss of every index in the shape of the indices; or a scalar as it is."""
    return loss.reshape(shape) if loss.ndim else loss
