"""The quantizers of vector-quantize-pytorch: VectorQuantize, and with it all that is built of it, ResidualVQ, SimVQ."""

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels.fuse._recipes import Recipe, is_transparent, neighbour, why_not_class
from vqkernels.fuse._search import nearest, nearest_levels
from vqkernels.ops import code_statistics, nearest_code


@torch.compiler.disable
def _forward(
    self: Any,
    x: Tensor,
    indices: Tensor | None = None,
    mask: Tensor | None = None,
    lens: Tensor | None = None,
    topk: int | None = None,
    sample_codebook_temp: float | None = None,
    freeze_codebook: bool | None = None,
    return_loss_breakdown: bool = False,
    codebook_transform_fn: Any = None,
    ema_update_weight: Any = None,
    accum_ema_update: bool = False,
    ema_update: bool | None = None,
) -> Any:
    """The original, on a shallow copy of itself whose codebook searches and counts without a row x code matrix.

    The copies share all parameters, buffers and modules with their originals and live as long as the call: the codebook
    itself stays as it is for whoever calls it and reads the distances that it returns.
    """
    layer = self
    codebook = self._codebook
    if (
        indices is None
        and topk is None
        and codebook_transform_fn is None
        and is_transparent(codebook)
        and not (self.training and _reads_distances(self, sample_codebook_temp))
    ):
        codebook = copy.copy(codebook)
        codebook.forward = functools.partial(_codebook_forward, codebook)
        codebook.track_cluster_size_and_embed_avg = functools.partial(_track, codebook)
        layer = copy.copy(self)
        layer._modules = {**self._modules, "_codebook": codebook}
    return type(self).forward(
        layer,
        x,
        indices,
        mask,
        lens,
        topk,
        sample_codebook_temp,
        freeze_codebook,
        return_loss_breakdown,
        codebook_transform_fn,
        ema_update_weight,
        accum_ema_update,
        ema_update,
    )


def _reads_distances(self: Any, temperature: float | None) -> bool:
    """Whether training needs the distances themselves: two losses and sampling do."""
    temperature = self._codebook.sample_codebook_temp if temperature is None else temperature
    sampling = self._codebook.gumbel_sample.keywords
    return (
        self.has_codebook_diversity_loss
        or (self.has_commitment_loss and self.commitment_use_cross_entropy_loss)
        or (temperature > 0 and (sampling["stochastic"] or sampling["straight_through"]))
    )


@torch.amp.autocast("cuda", enabled=False)
def _codebook_forward(
    self: Any,
    x: Tensor,
    sample_codebook_temp: float | None = None,
    mask: Tensor | None = None,
    freeze_codebook: bool = False,
    codebook_transform_fn: None = None,
    ema_update_weight: Any = None,
    accum_ema_update: bool = False,
    ema_update: bool | None = None,
    topk: None = None,
    update_usage: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.float()
    rows = x if x.ndim >= 4 else x.unsqueeze(0)
    shape = rows.shape[:-1]
    rows = rows.flatten(1, -2)
    heads, num, _ = rows.shape
    if mask is not None:
        batch, length = mask.shape
        mask = mask[:, None].expand(batch, num // (batch * length), length).reshape(num).expand(heads, num)
    self.init_embed_(rows, mask=mask)
    if self.affine_param:
        self.update_affine(rows, self.embed, mask=mask)
    embed = (self.embed if self.learnable_codebook else self.embed.detach()).to(rows.dtype)
    if self.vq_bridge is not None:
        embed = self.vq_bridge(embed)
    if self.affine_param:
        codebook_std = self.codebook_variance.clamp(min=1e-5).sqrt()
        batch_std = self.batch_variance.clamp(min=1e-5).sqrt()
        embed = (embed - self.codebook_mean) * (batch_std / codebook_std) + self.batch_mean

    indices = nearest_code(rows, embed, metric="dot" if self.use_cosine_sim else "l2")
    chosen = indices.clamp(min=0)  # argmax answers 0 for NaN
    offsets = embed.shape[1] * torch.arange(heads, device=rows.device).unsqueeze(-1)
    quantized = F.embedding(chosen + offsets, embed.flatten(0, 1)).reshape(*shape, embed.shape[-1])
    if self.training and update_usage and not freeze_codebook:
        # Handed on as it is to _track, which counts indices in place of one-hot rows.
        self.update_codebook(
            rows,
            indices,
            mask=mask,
            ema_update_weight=ema_update_weight,
            accum_ema_update=accum_ema_update,
            ema_update=ema_update,
        )
    chosen = chosen.reshape(shape)
    unread = rows.new_full((), torch.nan).expand(*shape, embed.shape[1])
    if x.ndim < 4:
        quantized, chosen = quantized.squeeze(0), chosen.squeeze(0)
    return quantized, chosen, unread


def _track(
    self: Any,
    flatten: Tensor,
    indices: Tensor,
    mask: Tensor | None = None,
    ema_update_weight: Any = None,
    accum_ema_update: bool = False,
) -> None:
    if self.affine_param:
        codebook_std = self.codebook_variance.clamp(min=1e-5).sqrt()
        batch_std = self.batch_variance.clamp(min=1e-5).sqrt()
        flatten = (flatten - self.batch_mean) * (codebook_std / batch_std) + self.codebook_mean
    if mask is not None:
        indices = indices.masked_fill(~mask, -1)
    counts, sums = code_statistics(flatten.detach(), indices, self.codebook_size, heads=True)
    cluster_size = counts.to(flatten.dtype)
    self.all_reduce_fn(cluster_size)
    self.all_reduce_fn(sums)
    if callable(ema_update_weight):
        ema_update_weight = ema_update_weight(sums, cluster_size)
    if accum_ema_update:
        accum_grad_ = neighbour(self, "accum_grad_")
        accum_grad_(self.cluster_size, cluster_size)
        accum_grad_(self.embed_avg, sums)
    else:
        ema_inplace = neighbour(self, "ema_inplace")
        ema_inplace(self.cluster_size, cluster_size, self.decay, ema_update_weight)
        ema_inplace(self.embed_avg, sums, self.decay, ema_update_weight)


def _refuse_layer(self: Any) -> str | None:
    codebook = self._codebook
    if not _CODEBOOK.concerns(type(codebook)):
        return f"its codebook is a {type(codebook).__name__}"
    reason = why_not_class(_CODEBOOK, type(codebook))
    replaced = [name for name in vars(type(codebook)) if name in codebook.__dict__]
    sample = codebook.gumbel_sample
    if not isinstance(sample, functools.partial) or sample.func is not neighbour(codebook, "gumbel_sample"):
        replaced.append("gumbel_sample")
    if replaced and reason is None:
        return f"{replaced[0]}() of its codebook has been replaced"
    return reason


@torch.compiler.disable
def _residual_forward(
    self: Any,
    x: Tensor,
    mask: Tensor | None = None,
    indices: Any = None,
    return_all_codes: bool = False,
    sample_codebook_temp: float | None = None,
    freeze_codebook: bool = False,
    beam_size: int | None = None,
    rand_quantize_dropout_fixed_seed: int | None = None,
) -> Any:
    """All levels at once in evaluation; else the original, whose layers are fused."""
    beam_size = beam_size if beam_size is not None else self.beam_size if self.training else self.eval_beam_size
    if mask is not None or indices is not None or (beam_size or 0) > 1 or not _can_fuse_levels(self, x):
        return type(self).forward(
            self,
            x,
            mask,
            indices,
            return_all_codes,
            sample_codebook_temp,
            freeze_codebook,
            beam_size,
            rand_quantize_dropout_fixed_seed,
        )
    rows = self.project_in(x)
    metric = "dot" if self.layers[0].use_cosine_sim else "l2"
    quantized, all_indices = nearest_levels(rows, [layer._codebook.embed[0] for layer in self.layers], metric)
    losses = torch.stack([layer.zero.float() for layer in self.layers])
    results = (self.project_out(quantized), all_indices, losses)
    return (*results, self.get_codes_from_indices(all_indices)) if return_all_codes else results


def _can_fuse_levels(self: Any, x: Tensor) -> bool:
    """Whether the loop over the levels does nothing but search and subtract, and nobody wants to see its steps."""
    return (
        not self.training
        and x.dtype == torch.float32
        and x.ndim in (2, 3)
        and not torch.is_autocast_enabled(x.device.type)
        and not self.implicit_neural_codebook
        and not self.diveq
        and self.quant_grad_frac <= 0
        and all(
            _is_plain(layer) and not layer.training and is_transparent(layer, layer._codebook) for layer in self.layers
        )
    )


def _is_plain(layer: Any) -> bool:
    codebook = layer._codebook
    return (
        layer.heads == 1
        and layer.channel_last
        and not (layer.accept_image_fmap or layer.accept_3d_fmap)
        and not codebook.affine_param
        and codebook.vq_bridge is None
        and codebook.embed.dtype == torch.float32
        and not (torch.is_grad_enabled() and codebook.learnable_codebook and codebook.embed.requires_grad)
        and bool(codebook.initted)
    )


def _refuse_residual(self: Any) -> str | None:
    for layer in self.layers:
        if not _LAYER.concerns(type(layer)):
            return f"it holds a {type(layer).__name__}"
        reason = why_not_class(_LAYER, type(layer)) or _refuse_layer(layer)
        if reason is not None:
            return reason
        if "forward" in layer.__dict__:
            return "forward() of a layer has been replaced"
    return None


def _sim_forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.movedim(1, -1) if self.channel_first else x
    shape = x.shape
    x = x.flatten(1, -2)
    codebook = self.codebook
    indices = nearest(x, codebook)
    quantized = F.embedding(indices, codebook)
    loss = (
        F.mse_loss(x.detach(), quantized)
        + F.mse_loss(x, quantized.detach()) * self.input_to_quantize_commit_loss_weight
    )
    if self.rotation_trick:
        quantized = neighbour(self, "rotate_to")(x, quantized)
    else:
        quantized = (quantized - x).detach() + x
    quantized, indices = quantized.reshape(shape), indices.reshape(shape[:-1])
    return (quantized.movedim(-1, 1) if self.channel_first else quantized), indices, loss * self.commitment_weight


_recipe = functools.partial(Recipe, library="vector-quantize-pytorch", versions="1.32")

# Nothing of it is replaced: the copy of it that a fused layer uses is.
_CODEBOOK = _recipe(
    class_path="vector_quantize_pytorch.vector_quantize_pytorch.Codebook",
    methods={},
    sources=frozenset({"414c0314a7a9622d"}),
    uses=("default", "cdist", "gumbel_sample", "accum_grad_", "ema_inplace", "pack_one"),
)
_LAYER = _recipe(
    class_path="vector_quantize_pytorch.vector_quantize_pytorch.VectorQuantize",
    methods={"forward": _forward},
    sources=frozenset({"04f708f95f2b1bfe"}),
    refuse=_refuse_layer,
)
RECIPES: tuple[Recipe, ...] = (
    _LAYER,
    _recipe(
        class_path="vector_quantize_pytorch.residual_vq.ResidualVQ",
        methods={"forward": _residual_forward},
        sources=frozenset({"44f192193734223d"}),
        uses=("frac_gradient",),
        refuse=_refuse_residual,
    ),
    _recipe(
        class_path="vector_quantize_pytorch.sim_vq.SimVQ",
        methods={"forward": _sim_forward},
        sources=frozenset({"8b1cfd17ea5ce9bb"}),
        uses=("pack_one", "rotate_to"),
    ),
)
