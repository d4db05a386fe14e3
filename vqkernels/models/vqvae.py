"""The VQ-VAE of van den Oord et al., "Neural Discrete Representation Learning" (arXiv 1711.00937), for images."""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqkernels import reference


class VQVAEOutput(NamedTuple):
    """What a forward pass of `VQVAE` returns."""

    reconstruction: Tensor
    loss: Tensor
    indices: Tensor


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), [B, C, H, W] to the same shape."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, hidden_channels, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def _residual_stack(layers: int, channels: int, hidden_channels: int) -> list[nn.Module]:
    return [*(ResidualBlock(channels, hidden_channels) for _ in range(layers)), nn.ReLU()]


class VQVAE(nn.Module):
    """A convolutional VQ-VAE: an image becomes a small map of codes, and an image again.

    The defaults are the published ones for 32x32 colour images, with EMA codebook and straight-through gradient. With
    `quantizer=vqkernels.nn.VectorQuantize` the same model, with the same state_dict, runs on the fused kernels.

    Args:
        in_channels: channels C of an image.
        hidden_channels: width of encoder and decoder; the strided convolutions before the last have half of it.
        residual_layers: residual blocks in the encoder and in the decoder.
        residual_channels: width inside a residual block.
        downsamplings: convolutions of stride 2; a code stands for 2^downsamplings x 2^downsamplings pixels.
        codebook_size: codes K.
        codebook_dim: dimension D of a code and channels of the latent map.
        commitment_weight: weight of the loss that draws latents to their codes.
        decay: of the moving averages that the codebook is made of.
        quantizer: class of the quantizer.
        quantizer_options: further arguments of the quantizer.

    Raises:
        ValueError: a size is too small.
    """

    def __init__(
        self,
        in_channels: int = 3,
        hidden_channels: int = 128,
        residual_layers: int = 2,
        residual_channels: int = 32,
        downsamplings: int = 2,
        codebook_size: int = 512,
        codebook_dim: int = 64,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        quantizer: type[reference.VectorQuantize] = reference.VectorQuantize,
        **quantizer_options: Any,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("hidden_channels", hidden_channels, 2),
            ("residual_layers", residual_layers, 0),
            ("residual_channels", residual_channels, 1),
            ("downsamplings", downsamplings, 1),
            ("codebook_size", codebook_size, 1),
            ("codebook_dim", codebook_dim, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.in_channels = in_channels
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.stride = 2**downsamplings

        widths = [in_channels, *[hidden_channels // 2] * (downsamplings - 1), hidden_channels]
        down: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            down += [nn.Conv2d(width, next_width, 4, stride=2, padding=1), nn.ReLU()]
        self.encoder = nn.Sequential(
            *down,
            nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1),
            *_residual_stack(residual_layers, hidden_channels, residual_channels),
            nn.Conv2d(hidden_channels, codebook_dim, 1),
        )
        self.quantizer = quantizer(
            dim=codebook_dim,
            codebook_size=codebook_size,
            decay=decay,
            commitment_weight=commitment_weight,
            rotation_trick=False,
            accept_image_fmap=True,
            **quantizer_options,
        )
        up: list[nn.Module] = []
        for width, next_width in pairwise(reversed(widths)):
            up += [nn.ConvTranspose2d(width, next_width, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(
            nn.Conv2d(codebook_dim, hidden_channels, 3, padding=1),
            *_residual_stack(residual_layers, hidden_channels, residual_channels),
            *up[:-1],
        )

    def encode(self, x: Tensor) -> Tensor:
        """The latent map before quantization, [B, D, H / stride, W / stride], of images [B, C, H, W].

        Raises:
            ValueError: the channels are not `in_channels`, or a side is not a positive multiple of `stride`.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected images of shape [B, {self.in_channels}, H, W], got {list(x.shape)}")
        if min(x.shape[2:]) < self.stride or x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ValueError(f"x: expected height and width to be multiples of {self.stride}, got {list(x.shape[2:])}")
        return self.encoder(x)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The indices, int64 [B, H / stride, W / stride], of images [B, C, H, W]; leaves the codebook as it is."""
        return self.quantizer(self.encode(x), freeze_codebook=True)[1]

    def decode(self, quantized: Tensor) -> Tensor:
        """Images [B, C, h stride, w stride] of a map of code vectors [B, D, h, w].

        Raises:
            ValueError: it has another shape.
        """
        if quantized.ndim != 4 or quantized.shape[1] != self.codebook_dim:
            raise ValueError(
                f"quantized: expected a map of shape [B, {self.codebook_dim}, h, w], got {list(quantized.shape)}"
            )
        return self.decoder(quantized)

    def decode_codes(self, indices: Tensor) -> Tensor:
        """Images [B, C, h stride, w stride] of code indices, int64 [B, h, w] with values in [0, K).

        Raises:
            ValueError: it has another shape.
        """
        if indices.ndim != 3:
            raise ValueError(f"indices: expected shape [B, h, w], got {list(indices.shape)}")
        return self.decode(self.quantizer.get_output_from_indices(indices))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Images of the codes of images, [B, C, H, W] to the same shape; leaves the codebook as it is."""
        return self.decode_codes(self.codes(x))

    def forward(self, x: Tensor) -> VQVAEOutput:
        """Encodes, quantizes and decodes images [B, C, H, W]; in training mode it also updates the codebook.

        Returns:
            reconstruction: [B, C, H, W]. The reconstruction loss is the caller's.
            loss: float32, a scalar: commitment_weight times the mean squared distance of latents to their codes, 0
                outside training.
            indices: int64 [B, H / stride, W / stride].
        """
        quantized, indices, loss = self.quantizer(self.encode(x))
        return VQVAEOutput(self.decode(quantized), loss, indices)
