"""Models of the packages that `vqkernels.fuse` knows, built from their configurations with random weights."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Subject(NamedTuple):
    """A model and how to call it.

    `model(*inputs)` is put through `outputs`, which gives its float tensors, losses (scalars) last if it `trains`.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    outputs: Callable[[Any], tuple[Tensor, ...]]
    trains: bool


class Autoencoder(nn.Module):
    """A quantizer layer between two linear ones."""

    def __init__(self, quantizer: nn.Module, dim: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(dim, dim)
        self.quantizer = quantizer
        self.decoder = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, loss = self.quantizer(self.encoder(x))
        return self.decoder(quantized), loss


class TokenPredictor(nn.Module):
    """A random-projection quantizer, whose codes are targets, beside one class for padding."""

    def __init__(self, quantizer: nn.Module, dim: int, codebook_size: int) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.head = nn.Linear(dim, codebook_size + 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(x)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), self.quantizer(x).flatten())


def _lucidrains(name: str, large: bool, **arguments: Any) -> Subject:
    import vector_quantize_pytorch

    dim, codes, rows = (128, 1024, 2048) if large else (16, 61, 50)
    sizes = {"codebook_size": codes, "codebook_dim": 16} if name.startswith("Random") else {"codebook_size": codes}
    quantizer = getattr(vector_quantize_pytorch, name)(dim=dim, **sizes, **arguments)
    wrap = TokenPredictor(quantizer, dim, codes) if name.startswith("Random") else Autoencoder(quantizer, dim)
    return Subject(wrap, (torch.randn(2, rows, dim),), lambda result: (result[0], result[1].sum()), True)


def _diffusers_vqmodel(large: bool) -> Subject:
    from diffusers import VQModel

    model = VQModel(
        block_out_channels=(32, 64) if large else (32,),
        down_block_types=("DownEncoderBlock2D",) * (2 if large else 1),
        up_block_types=("UpDecoderBlock2D",) * (2 if large else 1),
        norm_num_groups=8,
        num_vq_embeddings=8192 if large else 61,
        latent_channels=4,
        vq_embed_dim=4,
    )
    inputs = (torch.randn(2, 3, *(2 * [128 if large else 16])), False)
    return Subject(model, inputs, lambda result: (result[0], result[1]), True)


class _Encoding(nn.Module):
    """A model whose encode is its forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        return self.model.encode(*inputs)


def _transformers_image(name: str, large: bool) -> Subject:
    package = f"transformers.models.{name.lower()}"
    modeling = importlib.import_module(f"{package}.modeling_{name.lower()}")
    configuration = importlib.import_module(f"{package}.configuration_{name.lower()}")
    config = getattr(configuration, f"{name}VQVAEConfig")(
        embed_dim=256 if large else 8,
        latent_channels=256 if large else 8,
        num_embeddings=8192 if large else 61,
        base_channels=32,
        channel_multiplier=[1, 1, 2] if large else [1, 2],
        num_res_blocks=1,
        resolution=128 if large else 16,
        **({"num_patches": 32 if large else 8, "out_channels": 3} if name == "Janus" else {}),
    )
    model = getattr(modeling, f"{name}VQVAE")(config)
    images = torch.randn(2, 3, *(2 * [128 if large else 16]))
    if name == "Janus":
        return Subject(model, (images,), lambda result: (result.decoded_pixel_values, result.embedding_loss), True)
    return Subject(
        _Encoding(model), (images,), lambda result: (result.quantized_last_hidden_state, result.embedding_loss), True
    )


def _transformers_glm_image(large: bool) -> Subject:
    from transformers.models.glm_image.configuration_glm_image import GlmImageVQVAEConfig
    from transformers.models.glm_image.modeling_glm_image import GlmImageVQVAE

    dim = 256 if large else 8
    config = GlmImageVQVAEConfig(embed_dim=dim, num_embeddings=8192 if large else 61, latent_channels=dim)
    return Subject(
        _Encoding(GlmImageVQVAE(config)),
        (torch.randn(2, dim, *(2 * [32 if large else 8])),),
        lambda result: (result.quantized_last_hidden_state, result.embedding_loss),
        False,
    )


def _transformers_emu3(large: bool) -> Subject:
    from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

    config = Emu3VQVAEConfig(
        codebook_size=8192 if large else 61,
        embed_dim=4,
        latent_channels=4,
        base_channels=32,
        channel_multiplier=[1, 2],
        num_res_blocks=1,
        attn_resolutions=[],
        temporal_downsample_factor=4,
        hidden_size=64,
    )
    size = 128 if large else 16
    inputs = (torch.randn(1, 4, 3, size, size), torch.tensor([[size, size]]))
    return Subject(_Encoding(Emu3VQVAE(config)), inputs, lambda result: (result.last_hidden_state,), False)


def _randomize_codebooks(model: nn.Module, scale: float) -> nn.Module:
    """Fills the codebooks of audio models, which start out as zeros, with codes that shrink from level to level."""
    level = 0
    for module in model.modules():
        for name in ("embed", "embed_sum"):
            if name in module._buffers:
                module._buffers[name].normal_(std=scale * 0.8**level)
                level += 1
    return model


def _transformers_encodec(large: bool) -> Subject:
    from transformers import EncodecConfig, EncodecModel

    dim = 128 if large else 16
    config = EncodecConfig(
        num_filters=16 if large else 4,
        hidden_size=dim,
        codebook_dim=dim,
        codebook_size=1024 if large else 64,
        upsampling_ratios=[8, 5, 4, 2] if large else [4, 4],
        num_lstm_layers=1,
        target_bandwidths=[6.0] if large else [36.0],
    )
    model = _randomize_codebooks(EncodecModel(config), 0.1)
    inputs = (torch.randn(2, 1, 24000 if large else 960), None, config.target_bandwidths[0])
    return Subject(model, inputs, lambda result: (result.audio_values,), True)


def _transformers_xcodec(large: bool) -> Subject:
    from transformers.models.xcodec.configuration_xcodec import XcodecConfig
    from transformers.models.xcodec.modeling_xcodec import XcodecResidualVectorQuantization

    config = XcodecConfig(codebook_size=1024 if large else 64, codebook_dim=128 if large else 16)
    stack = XcodecResidualVectorQuantization(config)
    _randomize_codebooks(stack, 1.0)
    inputs = (torch.randn(2, config.codebook_dim, 500 if large else 30),)
    return Subject(_RoundTrip(stack), inputs, lambda result: (result,), False)


class _RoundTrip(nn.Module):
    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer.decode(self.quantizer.encode(x))


def _transformers_mimi(large: bool) -> Subject:
    from transformers import MimiConfig, MimiModel

    hidden, dim = (128, 64) if large else (32, 16)
    ratios = [8, 6, 5, 4] if large else [4, 4]
    config = MimiConfig(
        hidden_size=hidden,
        num_filters=16 if large else 4,
        upsampling_ratios=ratios,
        upsample_groups=hidden,
        num_hidden_layers=1,
        intermediate_size=hidden,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        codebook_size=2048 if large else 64,
        codebook_dim=dim,
        vector_quantization_hidden_dimension=dim,
        num_quantizers=8 if large else 4,
        frame_rate=24000 / (2 * torch.tensor(ratios).prod().item()),
    )
    model = _randomize_codebooks(MimiModel(config), 0.1)
    inputs = (torch.randn(2, 1, 96000 if large else 960),)
    return Subject(model, inputs, lambda result: (result.audio_values,), True)


def _transformers_dac(large: bool) -> Subject:
    from transformers import DacConfig, DacModel

    config = DacConfig(
        encoder_hidden_size=16 if large else 8,
        decoder_hidden_size=256 if large else 32,
        downsampling_ratios=[2, 4, 8, 8] if large else [4, 4],
        upsampling_ratios=[8, 8, 4, 2] if large else [4, 4],
        n_codebooks=9 if large else 4,
        codebook_size=1024 if large else 64,
    )
    inputs = (torch.randn(2, 1, 51200 if large else 960),)
    return Subject(DacModel(config), inputs, lambda result: (result.audio_values, result.loss.sum()), True)


SUBJECTS: dict[str, Callable[[bool], Subject]] = {
    "vector-quantize-pytorch VectorQuantize": lambda large: _lucidrains("VectorQuantize", large),
    "vector-quantize-pytorch VectorQuantize, cosine": lambda large: _lucidrains(
        "VectorQuantize", large, use_cosine_sim=True
    ),
    "vector-quantize-pytorch ResidualVQ": lambda large: _lucidrains("ResidualVQ", large, num_quantizers=8),
    "vector-quantize-pytorch GroupedResidualVQ": lambda large: _lucidrains(
        "GroupedResidualVQ", large, num_quantizers=4, groups=2
    ),
    "vector-quantize-pytorch SimVQ": lambda large: _lucidrains("SimVQ", large),
    "vector-quantize-pytorch ResidualSimVQ": lambda large: _lucidrains("ResidualSimVQ", large, num_quantizers=4),
    "vector-quantize-pytorch RandomProjectionQuantizer": lambda large: _lucidrains("RandomProjectionQuantizer", large),
    "diffusers VQModel": _diffusers_vqmodel,
    "transformers Encodec": _transformers_encodec,
    "transformers Mimi": _transformers_mimi,
    "transformers Dac": _transformers_dac,
    "transformers Xcodec (quantizer)": _transformers_xcodec,
    "transformers Chameleon": lambda large: _transformers_image("Chameleon", large),
    "transformers Janus": lambda large: _transformers_image("Janus", large),
    "transformers Emu3": _transformers_emu3,
    "transformers GlmImage": _transformers_glm_image,
}
