"""The transformers of diffusers: DiT, PixArt, Stable Diffusion 3 and 3.5, Flux, and others built of their blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqkernels.fuse import _blocks
from vqkernels.fuse._recipes import Recipe


def _ada_layer_norm_zero(
    self: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    emb: Tensor | None = None,
    *,
    numerics: str,
) -> tuple[Tensor, ...]:
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *others = self.linear(self.silu(emb)).chunk(6, dim=1)
    return _blocks.normalized(self.norm, x, shift[:, None], scale[:, None], numerics), *others


def _ada_layer_norm_zero_single(
    self: Any, x: Tensor, emb: Tensor | None = None, *, numerics: str
) -> tuple[Tensor, Tensor]:
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return _blocks.normalized(self.norm, x, shift[:, None], scale[:, None], numerics), gate


def _ada_layer_norm_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor, *, numerics: str) -> Tensor:
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return _blocks.normalized(self.norm, x, shift[:, None], scale[:, None], numerics)


def _sd35_ada_layer_norm_zero_x(
    self: Any, hidden_states: Tensor, emb: Tensor | None = None, *, numerics: str
) -> tuple[Tensor, ...]:
    shift, scale, gate, *mlp, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
    first, second = (shift[:, None], scale[:, None]), (shift2[:, None], scale2[:, None])
    y, y2 = _blocks.normalized_twice(self.norm, hidden_states, first, second, numerics)
    return y, gate, *mlp, y2, gate2


def _basic_block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    *,
    numerics: str,
) -> Tensor:
    if cross_attention_kwargs or self._chunk_size is not None or hidden_states.ndim != 3:
        return type(self).forward(
            self,
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            cross_attention_kwargs,
            class_labels,
            added_cond_kwargs,
        )
    x = hidden_states.contiguous()  # as the original's sums are, whose first addend is the branch
    single = self.norm_type == "ada_norm_single"
    gate = gate_mlp = shift_mlp = scale_mlp = None
    if single:
        table = self.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
        y = _blocks.normalized(self.norm1, x, shift, scale, numerics)
    elif self.norm_type == "ada_norm_zero":
        y, *modulation = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
        gate, shift_mlp, scale_mlp, gate_mlp = (m[:, None] for m in modulation)
    else:
        y = self.norm1(x)
    y = y if self.pos_embed is None else self.pos_embed(y)
    context = encoder_hidden_states if self.only_cross_attention else None
    branch = self.attn1(y, encoder_hidden_states=context, attention_mask=attention_mask)

    if self.attn2 is not None:
        if single:  # PixArt has no norm before cross-attention
            x = y = _blocks.residual(x, branch, gate, numerics)
        else:
            x, y = _blocks.residual_normalized(self.norm2, x, branch, gate, None, None, numerics)
            y = y if self.pos_embed is None else self.pos_embed(y)
        branch = self.attn2(y, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        gate = None

    norm = self.norm2 if single else self.norm3
    x, y = _blocks.residual_normalized(norm, x, branch, gate, shift_mlp, scale_mlp, numerics)
    return _blocks.residual(x, self.ff(y), gate_mlp, numerics)


def _refuse_basic_block(module: Any) -> str | None:
    if module.norm_type not in ("layer_norm", "ada_norm_zero", "ada_norm_single"):
        return f"its norm_type is {module.norm_type}"
    return None


def _joint_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
    *,
    numerics: str,
) -> tuple[Tensor | None, Tensor]:
    if self._chunk_size is not None:
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    x, context = hidden_states, encoder_hidden_states
    arguments = joint_attention_kwargs or {}
    y, gate, *mlp = self.norm1(x, emb=temb)
    y2 = gate2 = None
    if self.use_dual_attention:
        *mlp, y2, gate2 = mlp
    if self.context_pre_only:
        context_y, context_modulation = self.norm1_context(context, temb), []
    else:
        context_y, *context_modulation = self.norm1_context(context, emb=temb)
    branch, context_branch = self.attn(hidden_states=y, encoder_hidden_states=context_y, **arguments)
    if self.use_dual_attention:
        x = _blocks.residual(x, branch, gate[:, None], numerics)
        branch, gate = self.attn2(hidden_states=y2, **arguments), gate2
    x = _feed_forward(self.norm2, self.ff, x, branch, (gate, *mlp), numerics)
    if self.context_pre_only:
        return None, x
    context = _feed_forward(self.norm2_context, self.ff_context, context, context_branch, context_modulation, numerics)
    return context, x


def _feed_forward(norm: Any, ff: Any, x: Tensor, branch: Tensor, modulation: Sequence[Tensor], numerics: str) -> Tensor:
    """The second half of a block: attention's branch joins the stream, then that of the feed-forward network.

    Args:
        norm: of the feed-forward network's input.
        ff: the feed-forward network.
        x: the stream [B, L, D].
        branch: what attention adds.
        modulation: gate of this branch; shift, scale and gate of the feed-forward network; each [B, D].
        numerics: see `vqkernels.fuse`.
    """
    gate, shift, scale, gate_mlp = (m[:, None] for m in modulation)
    x, y = _blocks.residual_normalized(norm, x, branch, gate, shift, scale, numerics)
    return _blocks.residual(x, ff(y), gate_mlp, numerics)


def _flux_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    *,
    numerics: str,
) -> tuple[Tensor, Tensor]:
    y, *modulation = self.norm1(hidden_states, emb=temb)
    context_y, *context_modulation = self.norm1_context(encoder_hidden_states, emb=temb)
    branch, context_branch, *adapter = self.attn(
        hidden_states=y,
        encoder_hidden_states=context_y,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x = _feed_forward(self.norm2, self.ff, hidden_states, branch, modulation, numerics)
    for image in adapter:  # an image prompt's, at most one
        x = x + image
    context = _feed_forward(
        self.norm2_context, self.ff_context, encoder_hidden_states, context_branch, context_modulation, numerics
    )
    return _clipped(context), x


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _flux_single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    *,
    numerics: str,
) -> tuple[Tensor, Tensor]:
    length = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    y, gate = self.norm(x, emb=temb)
    if numerics == "fp32" and type(self.act_mlp) is nn.GELU and _blocks.stands_for(self.act_mlp):
        hidden = _blocks.linear_gelu(self.proj_mlp, y, self.act_mlp.approximate)
    else:
        hidden = self.act_mlp(self.proj_mlp(y))
    branch = self.attn(hidden_states=y, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    branch = self.proj_out(torch.cat([branch, hidden], dim=2))
    x = _clipped(_blocks.residual(x, branch, gate[:, None], numerics))
    return x[:, :length], x[:, length:]


def _gelu(self: Any, hidden_states: Tensor) -> Tensor:
    return _blocks.linear_gelu(self.proj, hidden_states, self.approximate)


def _geglu(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return _blocks.linear_geglu(self.proj, hidden_states)


def _swiglu(self: Any, hidden_states: Tensor) -> Tensor:
    if type(self.activation) is not nn.SiLU or not _blocks.stands_for(self.activation):
        return type(self).forward(self, hidden_states)
    return _blocks.linear_swiglu(self.proj, hidden_states)


def _recipe(file: str, name: str, function: Any, sources: str, **arguments: Any) -> Recipe:
    return Recipe(
        library="diffusers",
        class_path=f"diffusers.models.{file}.{name}",
        methods={"forward": function},
        sources=frozenset({sources}),
        versions="0.42",
        **arguments,
    )


RECIPES: tuple[Recipe, ...] = (
    _recipe("normalization", "AdaLayerNormZero", _ada_layer_norm_zero, "41c759ecb820c47b"),
    _recipe("normalization", "AdaLayerNormZeroSingle", _ada_layer_norm_zero_single, "702950382e96281a"),
    _recipe("normalization", "AdaLayerNormContinuous", _ada_layer_norm_continuous, "60fc8b5098cefaa5"),
    _recipe("normalization", "SD35AdaLayerNormZeroX", _sd35_ada_layer_norm_zero_x, "f5a10890e166da8c"),
    _recipe("attention", "BasicTransformerBlock", _basic_block, "bac57ebd27cf9bb5", refuse=_refuse_basic_block),
    _recipe("attention", "JointTransformerBlock", _joint_block, "efb8dfd2d6abd323"),
    _recipe("transformers.transformer_flux", "FluxTransformerBlock", _flux_block, "d2149ad383724399"),
    _recipe("transformers.transformer_flux", "FluxSingleTransformerBlock", _flux_single_block, "0768c483682e3a0b"),
    _recipe("activations", "GELU", _gelu, "0c6b9e80d3edf90b", numerics=("fp32",)),
    _recipe("activations", "GEGLU", _geglu, "09ba04fe72bd7f35", numerics=("fp32",)),
    _recipe("activations", "SwiGLU", _swiglu, "30011d46623190a1", numerics=("fp32",)),
)
