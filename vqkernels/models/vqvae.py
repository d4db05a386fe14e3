"""The VQ-VAE of van den Oord et al., "Neural Discrete Representation Learning" (arXiv 1711.00937)."""

from collections.abc import Callable
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


CONVOLUTIONS: dict[int, tuple[type[nn.Module], type[nn.Module]]] = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
}


class ResidualBlock(nn.Module):
    """x + conv1(relu(conv3(relu(x)))) with kernels of width 3 and 1, [B, C, ...] to the same shape."""

    def __init__(self, channels: int, hidden_channels: int, conv: Callable[..., nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ReLU(),
            conv(channels, hidden_channels, 3, padding=1, bias=False),
            nn.ReLU(),
            conv(hidden_channels, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def _residual_stack(
    layers: int, channels: int, hidden_channels: int, conv: Callable[..., nn.Module]
) -> list[nn.Module]:
    return [*(ResidualBlock(channels, hidden_channels, conv) for _ in range(layers)), nn.ReLU()]


class VQVAE(nn.Module):
    """A convolutional VQ-VAE: an image or a signal becomes a small map of codes, and an image or a signal again.

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
        dimensions: 2 for images [B, C, H, W], 1 for signals [B, C, T], of which a code stands for 2^downsamplings
            samples. Below, H, W then is T and h, w is t.
        quantizer: class of the quantizer.
        quantizer_options: further arguments of the quantizer.

    Attributes:
        config: the arguments but `quantizer`, from which, with the state_dict, the model can be built again.

    Raises:
        ValueError: a size is too small, or dimensions is neither 1 nor 2.
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
        dimensions: int = 2,
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
        if dimensions not in CONVOLUTIONS:
            raise ValueError(f"dimensions: expected 1 or 2, got {dimensions}")
        self.config = {
            "in_channels": in_channels,
            "hidden_channels": hidden_channels,
            "residual_layers": residual_layers,
            "residual_channels": residual_channels,
            "downsamplings": downsamplings,
            "codebook_size": codebook_size,
            "codebook_dim": codebook_dim,
            "commitment_weight": commitment_weight,
            "decay": decay,
            "dimensions": dimensions,
            **quantizer_options,
        }
        self.in_channels = in_channels
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.dimensions = dimensions
        self.stride = 2**downsamplings

        conv, transposed_conv = CONVOLUTIONS[dimensions]
        widths = [in_channels, *[hidden_channels // 2] * (downsamplings - 1), hidden_channels]
        down: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            down += [conv(width, next_width, 4, stride=2, padding=1), nn.ReLU()]
        self.encoder = nn.Sequential(
            *down,
            conv(hidden_channels, hidden_channels, 3, padding=1),
            *_residual_stack(residual_layers, hidden_channels, residual_channels, conv),
            conv(hidden_channels, codebook_dim, 1),
        )
        self.quantizer = quantizer(
            dim=codebook_dim,
            codebook_size=codebook_size,
            decay=decay,
            commitment_weight=commitment_weight,
            rotation_trick=False,
            accept_image_fmap=dimensions == 2,
            channel_last=False,
            **quantizer_options,
        )
        up: list[nn.Module] = []
        for width, next_width in pairwise(reversed(widths)):
            up += [transposed_conv(width, next_width, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(
            conv(codebook_dim, hidden_channels, 3, padding=1),
            *_residual_stack(residual_layers, hidden_channels, residual_channels, conv),
            *up[:-1],
        )

    def encode(self, x: Tensor) -> Tensor:
        """The latent map before quantization, [B, D, H / stride, W / stride], of images [B, C, H, W].

        Raises:
            ValueError: the channels are not `in_channels`, or a side is not a positive multiple of `stride`.
        """
        sides = x.shape[2:]
        if len(sides) != self.dimensions or x.shape[1] != self.in_channels:
            expected = f"images of shape [B, {self.in_channels}, H, W]"
            if self.dimensions == 1:
                expected = f"signals of shape [B, {self.in_channels}, T]"
            raise ValueError(f"x: expected {expected}, got {list(x.shape)}")
        if any(side < self.stride or side % self.stride for side in sides):
            what = "length to be a multiple" if self.dimensions == 1 else "height and width to be multiples"
            raise ValueError(f"x: expected {what} of {self.stride}, got {list(sides)}")
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
        if quantized.ndim != self.dimensions + 2 or quantized.shape[1] != self.codebook_dim:
            sides = "h, w" if self.dimensions == 2 else "t"
            raise ValueError(
                f"quantized: expected a map of shape [B, {self.codebook_dim}, {sides}], got {list(quantized.shape)}"
            )
        return self.decoder(quantized)

    def decode_codes(self, indices: Tensor) -> Tensor:
        """Images [B, C, h stride, w stride] of code indices, int64 [B, h, w] with values in [0, K).

        Raises:
            ValueError: it has another shape.
        """
        if indices.ndim != self.dimensions + 1:
            sides = "h, w" if self.dimensions == 2 else "t"
            raise ValueError(f"indices: expected shape [B, {sides}], got {list(indices.shape)}")
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
