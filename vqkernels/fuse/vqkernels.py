"""Blocks of this package in plain PyTorch, and its diffusion transformer, on the fused operations."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels import reference
from vqkernels.fuse._blocks import stands_for
from vqkernels.fuse._recipes import NUMERICS, Recipe
from vqkernels.models.dit import DiT
from vqkernels.nn import attn_block, dit_block, final_layer, spatial_transformer
from vqkernels.reference.dit_block import EPS, check_condition

Rope = tuple[Tensor, Tensor]


def _are(kind: type[nn.Module], *modules: Any) -> bool:
    """Whether a parent may do the work of these modules, all of which are still of the class that they are made of."""
    return all(type(module) is kind for module in modules) and stands_for(*modules)


def _are_plain_norms(*norms: Any) -> bool:
    return _are(nn.LayerNorm, *norms) and all(norm.weight is None and norm.eps == EPS for norm in norms)


def _is_linear(linear: Any) -> bool:
    return _are(nn.Linear, linear) and linear.bias is not None


def _is_modulation(modulation: Any) -> bool:
    """Whether a modulation is a linear layer, of whichever kind, of the SiLU of a condition."""
    return _are(nn.Sequential, modulation) and len(modulation) == 2 and _are(nn.SiLU, modulation[0])


def _attention(self: Any, x: Tensor, rope: Rope | None = None, *, numerics: str) -> Tensor:
    return dit_block.attention(self, x, rope, numerics=numerics)


def _cross_attention(self: Any, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
    return dit_block.cross_attention(self, x, context, mask, numerics="fp32")


def _mlp(self: Any, x: Tensor) -> Tensor:
    if not _is_linear(self.fc1) or not _are(nn.GELU, self.act) or self.act.approximate != "tanh":
        return type(self).forward(self, x)
    return dit_block.mlp(self, x, numerics="fp32")


def _swiglu(self: Any, x: Tensor) -> Tensor:
    if not _is_linear(self.w12):
        return type(self).forward(self, x)
    return dit_block.swiglu(self, x, numerics="fp32")


def _block(
    self: Any,
    x: Tensor,
    c: Tensor,
    rope: Rope | None = None,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    *,
    numerics: str,
) -> Tensor:
    if not _are_plain_norms(self.norm1, self.norm2):
        return type(self).forward(self, x, c, rope, context, context_mask)
    check_condition(x, c, self.hidden_size)
    modulation = self.adaLN_modulation(c)
    stream = dit_block.advance(self, (x, None, None), modulation, rope, context, context_mask, numerics=numerics)
    return dit_block.added(stream, numerics)


def _final_layer(self: Any, x: Tensor, c: Tensor, *, numerics: str) -> Tensor:
    if not _are_plain_norms(self.norm_final):
        return type(self).forward(self, x, c)
    check_condition(x, c, self.hidden_size)
    return final_layer.finish(self, (x, None, None), self.adaLN_modulation(c), numerics=numerics)


def _transform(self: Any, x: Tensor, c: Tensor, *, numerics: str) -> Tensor:
    if not _is_stack(self):
        return type(self).transform(self, x, c)
    # One SiLU for all blocks: it rounds as one for each does, but its gradient is taken of the sum of theirs.
    condition = c if numerics == "eager" else F.silu(c)
    stream: Any = (x, None, None)
    for block in self.blocks:
        stream = self.run_block(_advance, block, stream, condition, self.rope, numerics)
    modulation = _modulation(self.final_layer, condition, numerics)
    return final_layer.finish(self.final_layer, stream, modulation, numerics=numerics)


def _advance(block: Any, stream: Any, condition: Tensor, rope: Rope | None, numerics: str) -> Any:
    return dit_block.advance(block, stream, _modulation(block, condition, numerics), rope, numerics=numerics)


def _modulation(layer: Any, condition: Tensor, numerics: str) -> Tensor:
    """Of the condition, or where one SiLU serves all layers of what it made of it."""
    return layer.adaLN_modulation(condition) if numerics == "eager" else layer.adaLN_modulation[1](condition)


def _is_stack(model: DiT) -> bool:
    """Whether the model may do the work of its blocks and last layer."""
    last: Any = model.final_layer
    blocks: list[Any] = list(model.blocks)
    return (
        _are(reference.FinalLayer, last)
        and _are(reference.DiTBlock, *blocks)
        and not any(block.has_context for block in blocks)
        and _are_plain_norms(*[norm for block in blocks for norm in (block.norm1, block.norm2)], last.norm_final)
        and all(_is_modulation(layer.adaLN_modulation) for layer in (*blocks, last))
    )


def _attn_block(self: Any, x: Tensor) -> Tensor:
    if not _are(nn.GroupNorm, self.norm):
        return type(self).forward(self, x)
    return attn_block.attend(self, x)


def _context_attention(self: Any, x: Tensor, context: Tensor | None = None) -> Tensor:
    return spatial_transformer.attend(self, x, context, numerics="fp32")


def _geglu(self: Any, x: Tensor) -> Tensor:
    if not _is_linear(self.proj):
        return type(self).forward(self, x)
    return spatial_transformer.geglu(self, x, numerics="fp32")


def _transformer_block(self: Any, x: Tensor, context: Tensor | None = None, *, numerics: str) -> Tensor:
    if not _are(nn.LayerNorm, self.norm1, self.norm2, self.norm3):
        return type(self).forward(self, x, context)
    return spatial_transformer.transform_tokens(self, x, context, numerics=numerics)


def _spatial_transformer(self: Any, x: Tensor, context: Tensor | None = None) -> Tensor:
    if not _are(nn.GroupNorm, self.norm):
        return type(self).forward(self, x, context)
    return spatial_transformer.transform_map(self, x, context, numerics="fp32")


def _recipe(path: str, function: Any, method: str = "forward", numerics: tuple[str, ...] = NUMERICS) -> Recipe:
    return Recipe("vqkernels", f"vqkernels.{path}", {method: function}, numerics=numerics)


_ROUNDS_ONCE = ("fp32",)

RECIPES = (
    _recipe("reference.dit_block.Attention", _attention),
    _recipe("reference.dit_block.CrossAttention", _cross_attention, numerics=_ROUNDS_ONCE),
    _recipe("reference.dit_block.Mlp", _mlp, numerics=_ROUNDS_ONCE),
    _recipe("reference.dit_block.SwiGLU", _swiglu, numerics=_ROUNDS_ONCE),
    _recipe("reference.dit_block.DiTBlock", _block),
    _recipe("reference.final_layer.FinalLayer", _final_layer),
    _recipe("models.dit.DiT", _transform, "transform"),
    _recipe("reference.attn_block.AttnBlock", _attn_block, numerics=_ROUNDS_ONCE),
    _recipe("reference.spatial_transformer.ContextAttention", _context_attention, numerics=_ROUNDS_ONCE),
    _recipe("reference.spatial_transformer.GEGLU", _geglu, numerics=_ROUNDS_ONCE),
    _recipe("reference.spatial_transformer.TransformerBlock", _transformer_block),
    _recipe("reference.spatial_transformer.SpatialTransformer", _spatial_transformer, numerics=_ROUNDS_ONCE),
)
