"""What a diffusion model works on: pixels, or the latents of a trained VQ-VAE."""

from typing import Any

import torch
from torch import Tensor

from vqkernels.models import VQVAE
from vqkernels.nn import VectorQuantize


class Pixels:
    """Images [B, 1, 8, 8] with values from 0 to 1, moved to the range from -1 to 1.

    Attributes:
        shape: of an encoded image.
        bound: of the absolute values of an encoded image, None where there is none.
    """

    shape = (1, 8, 8)
    bound = 1.0

    def encode(self, images: Tensor) -> Tensor:
        return 2 * images - 1

    def decode(self, x: Tensor) -> Tensor:
        return ((x + 1) / 2).clamp(0, 1)

    def state(self) -> dict[str, Any]:
        """What `load_space` makes the space again of."""
        return {"kind": "pixels"}


class Latents:
    """The quantized latents [B, D, h, w] of a VQ-VAE, shifted and scaled to mean 0 and standard deviation 1.

    Decoding moves every latent to the nearest code first.

    Args:
        vqvae: trained on images [B, 1, 8, 8] with values from 0 to 1.
        mean: subtracted from the latents, per channel, [D].
        std: that the latents then are divided by, a scalar, so that distances stay as they are.

    Raises:
        ValueError: the model is not one of such images.
    """

    bound = None

    def __init__(self, vqvae: VQVAE, mean: Tensor, std: Tensor) -> None:
        if vqvae.dimensions != 2 or vqvae.in_channels != 1 or 8 % vqvae.stride:
            raise ValueError(
                "latents: expected a VQ-VAE of images [B, 1, 8, 8], got one with "
                f"dimensions={vqvae.dimensions}, in_channels={vqvae.in_channels}, stride {vqvae.stride}"
            )
        self.vqvae = vqvae.eval().requires_grad_(False)
        self.mean, self.std = mean, std
        self.shape = (vqvae.codebook_dim, 8 // vqvae.stride, 8 // vqvae.stride)

    @classmethod
    def of(cls, vqvae: VQVAE, images: Tensor) -> "Latents":
        """The space in which the latents of these images have mean 0 and standard deviation 1."""
        unscaled = cls(vqvae, torch.zeros(vqvae.codebook_dim), torch.ones(()))
        latents = unscaled.encode(images)
        mean = latents.mean((0, 2, 3))
        return cls(vqvae, mean, (latents - mean[:, None, None]).square().mean().sqrt().clamp(min=1e-6))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        quantized = self.vqvae.quantizer.get_output_from_indices(self.vqvae.codes(images))
        return (quantized - self.mean.to(quantized)[:, None, None]) / self.std.to(quantized)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        latents = x * self.std.to(x) + self.mean.to(x)[:, None, None]
        quantized = self.vqvae.quantizer(latents, freeze_codebook=True)[0]
        return self.vqvae.decode(quantized).clamp(0, 1)

    def state(self) -> dict[str, Any]:
        """What `load_space` makes the space again of."""
        return {
            "kind": "latents",
            "config": self.vqvae.config,
            "state_dict": {name: value.cpu() for name, value in self.vqvae.state_dict().items()},
            "mean": self.mean.cpu(),
            "std": self.std.cpu(),
        }


Space = Pixels | Latents


def load_space(state: dict[str, Any], device: torch.device | str = "cpu") -> Space:
    """The space of a checkpoint: what `state` returned.

    Raises:
        KeyError, RuntimeError, TypeError, ValueError: it is of something else.
    """
    if state["kind"] == "pixels":
        return Pixels()
    if state["kind"] != "latents":
        raise ValueError(f"kind: expected pixels or latents, got {state['kind']!r}")
    vqvae = VQVAE(**state["config"], quantizer=VectorQuantize)
    vqvae.load_state_dict(state["state_dict"])
    return Latents(vqvae.to(device), state["mean"].to(device), state["std"].to(device))
