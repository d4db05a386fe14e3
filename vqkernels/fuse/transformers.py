"""The quantizers of transformers: image tokenizers, audio codecs and their residual stacks."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels.fuse._levels import pays
from vqkernels.fuse._recipes import Recipe, is_untouched, why_not_class
from vqkernels.fuse._search import nearest, nearest_levels

_VERSIONS = "5.23"


def _image_forward(self: Any, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden_state.permute(0, 2, 3, 1).contiguous()
    indices = nearest(rows.view(-1, self.embedding_dim), self.embedding.weight)
    return *_straight_through(rows, self.embedding(indices).view(rows.shape), self.beta), indices


def _glm_image_forward(self: Any, hidden_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = F.normalize(hidden_state.permute(0, 2, 3, 1).contiguous(), p=2, dim=-1)
    embedding = F.normalize(self.embedding.weight, p=2, dim=-1)
    indices = nearest(rows.view(-1, self.embedding_dim), embedding)
    return *_straight_through(rows, embedding[indices].view(rows.shape), self.beta), indices


def _straight_through(rows: Tensor, quantized: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    loss = torch.mean((quantized.detach() - rows) ** 2) + beta * torch.mean((quantized - rows.detach()) ** 2)
    return (rows + (quantized - rows).detach()).permute(0, 3, 1, 2).contiguous(), loss


def _emu3_forward(self: Any, hidden_state: Tensor) -> Tensor:
    rows = hidden_state.permute(0, 1, 3, 4, 2).contiguous()
    return nearest(rows, self.embedding.weight)


def _euclidean_quantize(self: Any, hidden_states: Tensor) -> Tensor:
    return nearest(hidden_states, self.embed)


def _mimi_quantize(self: Any, hidden_states: Tensor) -> Tensor:
    return nearest(hidden_states.float(), self.embed.float())


def _dac_decode_latents(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    if hasattr(self.codebook, "_hf_hook"):  # accelerate brings its weights only for the original
        return type(self).decode_latents(self, hidden_states)
    codes = F.normalize(self.codebook.weight)
    # Of codes of length one the largest inner product decides, whatever the length of the row. The original adds |c|^2
    # to it, so that a code of zeros comes last: as NaN it is never chosen.
    codes = codes.masked_fill((codes == 0).all(1, keepdim=True), torch.nan)
    indices = nearest(hidden_states.transpose(1, 2), codes, metric="dot")
    return self.codebook(indices).transpose(1, 2), indices


def _stack_encode(self: Any, embeddings: Tensor, bandwidth: float | None = None) -> Tensor:
    layers = _layers(self)[: self.get_num_quantizers_for_bandwidth(bandwidth)]
    if not _can_fuse_levels(layers, embeddings):
        return type(self).encode(self, embeddings, bandwidth)
    return _levels(layers, embeddings)


def _mimi_stack_encode(self: Any, embeddings: Tensor, num_quantizers: int | None = None) -> Tensor:
    layers = _layers(self)[: self.num_quantizers if num_quantizers is None else num_quantizers]
    if not _can_fuse_levels(layers, embeddings):
        return type(self).encode(self, embeddings, num_quantizers)
    return _levels(layers, embeddings if self.input_proj is None else self.input_proj(embeddings))


def _layers(self: Any) -> list[Any]:
    return list(self.layers if hasattr(self, "layers") else self.quantizers)


def _can_fuse_levels(layers: list[Any], embeddings: Tensor) -> bool:
    """Whether the residuals of the original are what residual_quantize computes, and it pays."""
    return (
        len(layers) > 0
        and pays(embeddings, layers[0].codebook.embed.shape[0])
        and embeddings.dtype == torch.float32
        and not torch.is_autocast_enabled(embeddings.device.type)
        and all(
            layer.codebook.embed.dtype == torch.float32
            and layer.codebook.embed.device == embeddings.device
            and _is_untouched(layer)
            for layer in layers
        )
    )


def _levels(layers: list[Any], embeddings: Tensor) -> Tensor:
    _, indices = nearest_levels(embeddings.transpose(1, 2), [layer.codebook.embed for layer in layers])
    return indices.permute(2, 0, 1).contiguous()


def _is_untouched(layer: Any) -> bool:
    return is_untouched(layer, "encode", "decode") and is_untouched(layer.codebook, "encode", "quantize", "decode")


def _refuse_stack(self: Any) -> str | None:
    for layer in _layers(self):
        for module, recipes in ((layer, _LAYERS), (layer.codebook, _CODEBOOKS)):
            recipe = next((r for r in recipes if r.concerns(type(module))), None)
            reason = f"it holds a {type(module).__name__}" if recipe is None else why_not_class(recipe, type(module))
            if reason is not None:
                return reason
        if not _is_untouched(layer):
            return "a method of its layers has been replaced"
    return None


_recipe = functools.partial(Recipe, library="transformers", versions=_VERSIONS)


def _path(model: str, name: str) -> str:
    return f"transformers.models.{model}.modeling_{model}.{name}"


_CODEBOOKS: tuple[Recipe, ...] = (
    _recipe(
        class_path=_path("encodec", "EncodecEuclideanCodebook"),
        methods={"quantize": _euclidean_quantize},
        sources=frozenset({"399f81cc4dbc18d5"}),
    ),
    _recipe(
        class_path=_path("xcodec", "XcodecEuclideanCodebook"),
        methods={"quantize": _euclidean_quantize},
        sources=frozenset({"1aef1ce241a76de0"}),
    ),
    _recipe(
        class_path=_path("higgs_audio_v2_tokenizer", "HiggsAudioV2TokenizerEuclideanCodebook"),
        methods={"quantize": _euclidean_quantize},
        sources=frozenset({"68b1447966c3fd9f"}),
    ),
    _recipe(
        class_path=_path("mimi", "MimiEuclideanCodebook"),
        methods={"quantize": _mimi_quantize},
        sources=frozenset({"a024ad59a502db03"}),
    ),
)

# What a residual stack calls on the way to its codebooks; nothing of these is replaced.
_LAYERS: tuple[Recipe, ...] = (
    _recipe(
        class_path=_path("encodec", "EncodecVectorQuantization"), methods={}, sources=frozenset({"d72701ef22709af3"})
    ),
    _recipe(
        class_path=_path("xcodec", "XcodecVectorQuantization"), methods={}, sources=frozenset({"28dd0ec39b3cfbe8"})
    ),
    _recipe(class_path=_path("mimi", "MimiVectorQuantization"), methods={}, sources=frozenset({"ee7c5a614c882ce9"})),
)

RECIPES: tuple[Recipe, ...] = (
    *_CODEBOOKS,
    _recipe(
        class_path=_path("encodec", "EncodecResidualVectorQuantizer"),
        methods={"encode": _stack_encode},
        sources=frozenset({"005f6d5988ff9264"}),
        refuse=_refuse_stack,
    ),
    _recipe(
        class_path=_path("xcodec", "XcodecResidualVectorQuantization"),
        methods={"encode": _stack_encode},
        sources=frozenset({"de3d2aae97a2758c"}),
        refuse=_refuse_stack,
    ),
    _recipe(
        class_path=_path("mimi", "MimiResidualVectorQuantizer"),
        methods={"encode": _mimi_stack_encode},
        sources=frozenset({"ddbae1d2463cb542"}),
        refuse=_refuse_stack,
    ),
    _recipe(
        class_path=_path("dac", "DacVectorQuantize"),
        methods={"decode_latents": _dac_decode_latents},
        sources=frozenset({"47d117789c881de1"}),
    ),
    _recipe(
        class_path=_path("chameleon", "ChameleonVQVAEVectorQuantizer"),
        methods={"forward": _image_forward},
        sources=frozenset({"8a484d51ea6c14aa"}),
    ),
    _recipe(
        class_path=_path("janus", "JanusVQVAEVectorQuantizer"),
        methods={"forward": _image_forward},
        sources=frozenset({"4f2805849206073f"}),
    ),
    _recipe(
        class_path=_path("glm_image", "GlmImageVQVAEVectorQuantizer"),
        methods={"forward": _glm_image_forward},
        sources=frozenset({"0033db647c6e475d"}),
    ),
    _recipe(
        class_path=_path("emu3", "Emu3VQVAEVectorQuantizer"),
        methods={"forward": _emu3_forward},
        sources=frozenset({"40096242fa9a6e4a"}),
    ),
)
