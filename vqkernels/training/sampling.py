"""Draws images with a trained diffusion transformer."""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels.fuse import fuse
from vqkernels.models import Diffusion, DiT, sample
from vqkernels.models.checkpoint import UNREADABLE
from vqkernels.reference._checks import check_tensor
from vqkernels.training.checkpoint import FORMAT, read_checkpoint, refusal
from vqkernels.training.config import DiTConfig
from vqkernels.training.data import CLASSES
from vqkernels.training.spaces import Space, load_space


def build_model(config: DiTConfig, space: Space) -> DiT:
    """The transformer of a configuration, in plain PyTorch, with weights of torch's generator.

    Raises:
        ValueError: sizes do not fit.
    """
    channels, height, _ = space.shape
    return DiT(
        input_size=height,
        patch_size=config.patch_size,
        in_channels=channels,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        class_dropout_prob=config.class_dropout,
        num_classes=CLASSES,
        learn_sigma=config.learned_sigma,
    )


def fused(model: DiT, reference: bool) -> DiT:
    """The model, put on the fused operations unless `reference` says no."""
    if not reference:
        fuse(model, verbose=False)
    return model


def build_diffusion(config: DiTConfig) -> Diffusion:
    """The process of a configuration."""
    return Diffusion(schedule=config.schedule, prediction=config.prediction, learned_sigma=config.learned_sigma)


class Start(NamedTuple):
    """Images to begin with, [N, 1, 8, 8] with values from 0 to 1, and the share of the steps that change them."""

    images: Tensor
    strength: float


class Known(NamedTuple):
    """Images [N, 1, 8, 8] with values from 0 to 1, of which the pixels where a boolean mask [8, 8] is True stay."""

    images: Tensor
    mask: Tensor


class DiTSampler:
    """A model with what it takes to draw images with it.

    Args:
        config: of the run.
        model: put into evaluation mode.
        space: that the model works in.
    """

    def __init__(self, config: DiTConfig, model: DiT, space: Space) -> None:
        self.config, self.model, self.space = config, model.eval(), space
        self.diffusion = build_diffusion(config)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu", reference: bool | None = None
    ) -> "DiTSampler":
        """That of a checkpoint of a training run, with the moving average of the weights.

        Args:
            path: of the checkpoint.
            device: for the model.
            reference: do not fuse the model; None: as it was trained.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: it holds something else.
        """
        content, config = read_checkpoint(path, "dit", DiTConfig)
        try:
            space = load_space(content[FORMAT]["space"], device)
            model = build_model(config, space)
            prefix = "average.module."
            weights = {name: value for name, value in content["state_dict"].items() if name.startswith(prefix)}
            model.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items()})
        except UNREADABLE as error:
            raise ValueError(refusal(path, "dit", error)) from error
        is_reference = config.reference if reference is None else reference
        return cls(config, fused(model.to(device), is_reference), space)

    @property
    def default_method(self) -> str:
        """What draws well with few steps: "heun" for a flow, "ddim" for others, whose first levels are far apart."""
        return "heun" if self.diffusion.is_flow else "ddim"

    def draw(
        self,
        labels: Tensor,
        *,
        method: str | None = None,
        steps: int = 20,
        guidance: float = 1.5,
        seed: int = 0,
        start: Start | None = None,
        known: Known | None = None,
        report: Callable[[int, int, Tensor], None] | None = None,
    ) -> Tensor:
        """Images of the classes, float32 [N, 1, 8, 8] with values from 0 to 1.

        Args:
            labels: int64 [N], from 0 to 9.
            method: "ddpm", "ddim", "euler" or "heun"; see `vqkernels.models.sample`. None: the `default_method`.
            steps: of the method.
            guidance: scale of classifier-free guidance; 1: none.
            seed: of the noise, which is drawn on the CPU for all images together.
            start: images to begin with instead of noise.
            known: pixels that stay. Those latents stay all pixels of which do; at the end the pixels are put back.
            report: called after every step, as `sample` calls it.

        Raises:
            TypeError: labels are no tensor of int64.
            ValueError: an argument does not fit.
        """
        check_tensor("labels", labels, (torch.int64,))
        if labels.ndim != 1:
            raise ValueError(f"labels: expected shape [N], got {list(labels.shape)}")
        outside = labels[(labels < 0) | (labels >= CLASSES)]
        if len(outside):
            raise ValueError(f"labels: expected classes from 0 to {CLASSES - 1}, got {outside[0].item()}")
        if guidance != 1 and self.config.class_dropout == 0:
            raise ValueError(f"guidance: expected 1 for a model that was trained without class dropout, got {guidance}")
        device = next(self.model.parameters()).device
        shape = (len(labels), *self.space.shape)
        beginning = None if start is None else (self.space.encode(start.images.to(device)), start.strength)
        kept = None
        if known is not None:
            images, mask = known.images.to(device), known.mask.to(device)
            kept = (self.space.encode(images), self._mask_of_space(mask))
        x = sample(
            self.diffusion,
            self.model,
            shape,
            method=method or self.default_method,
            steps=steps,
            y=labels.to(device),
            guidance_scale=guidance,
            clip=self.space.bound,
            generator=torch.Generator().manual_seed(seed),
            device=device,
            start=beginning,
            known=kept,
            report=report,
        )
        result = self.space.decode(x)
        return result if known is None else torch.where(mask, images, result)

    def _mask_of_space(self, mask: Tensor) -> Tensor:
        """True where all pixels of a position are: [h, w] of a mask [8, 8]."""
        _, height, width = self.space.shape
        return mask.unflatten(0, (height, -1)).unflatten(2, (width, -1)).all(3).all(1)
