"""The autoencoders of diffusers: GroupNorm and SiLU of AutoencoderKL, VQModel and what else has their blocks."""

from typing import Any

import torch
from torch import Tensor, nn

from vqkernels.fuse import _blocks
from vqkernels.fuse._recipes import Recipe


def _resnet(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs:
        return type(self).forward(self, input_tensor, temb, *args, **kwargs)
    x = self.conv1(_blocks.group_normalized(self.norm1, input_tensor, self.nonlinearity))
    if self.time_emb_proj is not None:
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
    x = x + temb if temb is not None and self.time_embedding_norm == "default" else x
    x = self.conv2(self.dropout(_blocks.group_normalized(self.norm2, x, self.nonlinearity)))
    if self.conv_shortcut is not None:
        # In training DistributedDataParallel wants the layout of gradients that contiguous inputs give.
        input_tensor = self.conv_shortcut(input_tensor.contiguous() if self.training else input_tensor)
    x = input_tensor + x
    return x if self.output_scale_factor == 1 else x / self.output_scale_factor


def _refuse_resnet(module: Any) -> str | None:
    if module.upsample is not None or module.downsample is not None:
        return "it resamples"
    if module.time_embedding_norm == "scale_shift":
        return "the time embedding scales what its norm gives"
    return _refuse_activation(module.nonlinearity)


def _refuse_activation(activation: Any) -> str | None:
    return None if type(activation) is nn.SiLU else f"its activation is {type(activation).__name__}"


def _run(self: Any, block: Any, *inputs: Any) -> Tensor:
    if torch.is_grad_enabled() and self.gradient_checkpointing:
        return self._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)


def _encoder(self: Any, sample: Tensor) -> Tensor:
    sample = self.conv_in(sample)
    for block in (*self.down_blocks, self.mid_block):
        sample = _run(self, block, sample)
    return self.conv_out(_blocks.group_normalized(self.conv_norm_out, sample, self.conv_act))


def _decoder(self: Any, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
    if latent_embeds is not None:
        return type(self).forward(self, sample, latent_embeds)
    sample = self.conv_in(sample)
    for block in (self.mid_block, *self.up_blocks):
        sample = _run(self, block, sample, None)
    return self.conv_out(_blocks.group_normalized(self.conv_norm_out, sample, self.conv_act))


def _refuse_coder(module: Any) -> str | None:
    if type(module.conv_norm_out) is not nn.GroupNorm:
        return f"its last norm is {type(module.conv_norm_out).__name__}"
    return _refuse_activation(module.conv_act)


def _recipe(file: str, name: str, function: Any, source: str, refuse: Any) -> Recipe:
    return Recipe(
        library="diffusers",
        class_path=f"diffusers.models.{file}.{name}",
        methods={"forward": function},
        sources=frozenset({source}),
        versions="0.42",
        refuse=refuse,
        numerics=("fp32",),
    )


RECIPES: tuple[Recipe, ...] = (
    _recipe("resnet", "ResnetBlock2D", _resnet, "ce2a817d7216d10b", _refuse_resnet),
    _recipe("autoencoders.vae", "Encoder", _encoder, "b398b69ca51c9cdb", _refuse_coder),
    _recipe("autoencoders.vae", "Decoder", _decoder, "86089087b110eafc", _refuse_coder),
)
