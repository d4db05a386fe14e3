"""The attention layers of diffusers: norm and rotation of queries and keys, and the self-attention of images.

Projections, processors and the choice of an attention backend stay the original's.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.fuse import _blocks
from vqkernels.fuse._recipes import Recipe, neighbour, why_not_class
from vqkernels.ops import attention, qk_norm_rope


def _known(path: str, *sources: str) -> Recipe:
    """What stands for a class that is not fused itself but whose work is done here."""
    return Recipe("diffusers", f"diffusers.models.{path}", {}, frozenset(sources), "0.42")


_JOINT = _known("attention_processor.JointAttnProcessor2_0", "5bef4593bc1e45bc")
_SINGLE = _known("attention_processor.AttnProcessor2_0", "27a8e7631059efe6")
_FLUX = _known("transformers.transformer_flux.FluxAttnProcessor", "a2e1380f38a41a6e")
_RMS_NORM = _known("normalization.RMSNorm", "295369c16879a3d2")


def _joint_attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    numerics: str,
    **cross_attention_kwargs: Any,
) -> Any:
    x, context = hidden_states, encoder_hidden_states
    if not _JOINT.concerns(type(self.processor)) or cross_attention_kwargs or not _normalizes(self, x, numerics):
        return type(self).forward(self, x, context, attention_mask, **cross_attention_kwargs)
    q, k, v = _project(x, self.heads, self.to_q, self.to_k, self.to_v)
    q, k = qk_norm_rope(q, k, **_norms(self.norm_q, self.norm_k), numerics=numerics)
    length = q.shape[1]
    if context is not None:
        linears = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        context_q, context_k, context_v = _project(context, self.heads, *linears)
        norms = _norms(self.norm_added_q, self.norm_added_k)
        context_q, context_k = qk_norm_rope(context_q, context_k, **norms, numerics=numerics)
        q, k, v = _joined((q, k, v), (context_q, context_k, context_v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(q.dtype)
    if context is None:
        return self.to_out[1](self.to_out[0](y))
    y, context_y = y[:, :length], y[:, length:]
    context_y = context_y if self.context_pre_only else self.to_add_out(context_y)
    return self.to_out[1](self.to_out[0](y)), context_y


def _project(x: Tensor, heads: int, *linears: Any) -> list[Any]:
    """Queries, keys and values [B, L, H, D] of x [B, L, C]."""
    return [linear(x).unflatten(-1, (heads, -1)) for linear in linears]


def _joined(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Queries, keys and values of two streams, one after the other."""
    return [torch.cat(pair, dim=1) for pair in zip(first, second, strict=True)]


def _refuse_joint(module: Any) -> str | None:
    processor = type(module.processor)
    if not _JOINT.concerns(processor):
        return f"its processor is {processor.__name__}"
    return why_not_class(_JOINT, processor) or _refuse_norms(module)


def _pairs(module: Any) -> list[tuple[Any, Any]]:
    """The norms of queries and keys of the image, and of the context where there is one."""
    pairs = [(module.norm_q, module.norm_k)]
    if module.added_kv_proj_dim is not None:
        pairs.append((module.norm_added_q, module.norm_added_k))
    return pairs


def _norms(q_norm: Any, k_norm: Any) -> dict[str, Any]:
    """Two norms of heads as arguments of `qk_norm_rope`."""
    return {"norm": "rms", "q_weight": q_norm.weight, "k_weight": k_norm.weight, "eps": q_norm.eps}


def _are_rms_norms(*norms: Any) -> bool:
    """Whether these are norms by the root mean square, with a weight at most."""
    return all(
        (type(norm) is nn.RMSNorm or _RMS_NORM.concerns(type(norm)))
        and norm.eps is not None
        and getattr(norm, "bias", None) is None
        for norm in norms
    )


def _normalizes(module: Any, x: Tensor, numerics: str) -> bool:
    """Whether `qk_norm_rope` stands for the norms of a module of what is projected from x."""
    norms = [norm for pair in _pairs(module) for norm in pair]
    if not _are_rms_norms(*norms) or not _blocks.stands_for(*norms):
        return False
    if any(q_norm.eps != k_norm.eps for q_norm, k_norm in _pairs(module)):
        return False
    if not _blocks.takes(x, *[norm.weight for norm in norms]):
        return False
    # torch's own norm rounds elsewhere than the operation, but in one case.
    single = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return numerics == "fp32" or single or not any(type(norm) is nn.RMSNorm for norm in norms)


def _refuse_norms(module: Any) -> str | None:
    norms = [norm for pair in _pairs(module) for norm in pair]
    if not _are_rms_norms(*norms):
        return "its norms of queries and keys are not by the root mean square alone"
    reasons = [why_not_class(_RMS_NORM, type(norm)) for norm in norms if type(norm) is not nn.RMSNorm]
    return next(filter(None, reasons), None)


def _image_attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **cross_attention_kwargs: Any,
) -> Tensor:
    x = hidden_states
    if (
        not _SINGLE.concerns(type(self.processor))
        or encoder_hidden_states is not None
        or attention_mask is not None
        or cross_attention_kwargs.keys() - {"temb"}  # for a norm that these modules do not have
        or x.ndim != 4
    ):
        return type(self).forward(self, x, encoder_hidden_states, attention_mask, **cross_attention_kwargs)
    rows = _blocks.group_normalized(self.group_norm, x.flatten(2)).mT
    q, k, v = (t.transpose(1, 2) for t in _project(rows, self.heads, self.to_q, self.to_k, self.to_v))
    y = attention(q, k, v) if _blocks.takes(q, k, v) else F.scaled_dot_product_attention(q, k, v)
    y = self.to_out[1](self.to_out[0](y.transpose(1, 2).flatten(2))).mT.reshape(x.shape)
    y = y + x if self.residual_connection else y
    return y if self.rescale_output_factor == 1 else y / self.rescale_output_factor


def _refuse_image(module: Any) -> str | None:
    processor = type(module.processor)
    if not _SINGLE.concerns(processor):
        return f"its processor is {processor.__name__}"
    if module.norm_k is not None or module.spatial_norm is not None:
        return "it has other norms than that of the image"
    return why_not_class(_SINGLE, processor)


def _flux_attention(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    *,
    numerics: str,
    **kwargs: Any,
) -> Any:
    x, context = hidden_states, encoder_hidden_states
    tables: list[Any] = [None, None] if image_rotary_emb is None else list(image_rotary_emb)
    if (
        kwargs
        or not _FLUX.concerns(type(self.processor))
        or (context is None) != (self.added_kv_proj_dim is None)
        or not _normalizes(self, x, numerics)
        or any(t is not None and (t.requires_grad or t.dtype != torch.float32) for t in tables)
    ):
        return type(self).forward(self, x, context, attention_mask, image_rotary_emb, **kwargs)
    projected = neighbour(self, "_get_qkv_projections")(self, x, context)
    # By the size of a head: under tensor parallelism a process has fewer heads than the module says.
    q, k, v, *others = [t.unflatten(-1, (-1, self.head_dim)) for t in projected if isinstance(t, Tensor)]
    length = 0 if context is None else context.shape[1]
    # FluxPosEmbed, whose source the recipe knows, holds every value twice: repeat_interleave_real.
    tables = [None if t is None else t[:, ::2].to(x.device) for t in tables]
    image_tables = [None if t is None else t[length:] for t in tables]
    q, k = qk_norm_rope(q, k, *image_tables, **_norms(self.norm_q, self.norm_k), numerics=numerics)
    if context is not None:
        context_q, context_k, context_v = others
        context_tables = [None if t is None else t[:length] for t in tables]
        norms = _norms(self.norm_added_q, self.norm_added_k)
        context_q, context_k = qk_norm_rope(context_q, context_k, *context_tables, **norms, numerics=numerics)
        q, k, v = _joined((context_q, context_k, context_v), (q, k, v))
    y = neighbour(self, "dispatch_attention_fn")(
        q,
        k,
        v,
        attn_mask=attention_mask,
        backend=self.processor._attention_backend,
        parallel_config=self.processor._parallel_config,
    )
    y = y.flatten(2, 3).to(q.dtype)
    if context is None:
        return y
    context_y, y = y[:, :length], y[:, length:]
    return self.to_out[1](self.to_out[0](y.contiguous())), self.to_add_out(context_y.contiguous())


def _refuse_flux(module: Any) -> str | None:
    processor = type(module.processor)
    if not _FLUX.concerns(processor):
        return f"its processor is {processor.__name__}"
    return why_not_class(_FLUX, processor) or _refuse_norms(module)


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        library="diffusers",
        class_path="diffusers.models.attention_processor.Attention",
        methods={"forward": _joint_attention},
        sources=frozenset({"e609bc8f16dcdd32"}),
        versions="0.42",
        has_work=lambda module: module.norm_q is not None,
        refuse=_refuse_joint,
    ),
    Recipe(
        library="diffusers",
        class_path="diffusers.models.attention_processor.Attention",
        methods={"forward": _image_attention},
        sources=frozenset({"e609bc8f16dcdd32"}),
        versions="0.42",
        has_work=lambda module: module.norm_q is None and module.group_norm is not None,
        refuse=_refuse_image,
        numerics=("fp32",),
    ),
    Recipe(
        library="diffusers",
        class_path="diffusers.models.transformers.transformer_flux.FluxAttention",
        methods={"forward": _flux_attention},
        sources=frozenset({"f7551b0ef400d33a"}),
        versions="0.42",
        uses=("apply_rotary_emb", "FluxPosEmbed", "get_1d_rotary_pos_embed"),
        refuse=_refuse_flux,
    ),
)
