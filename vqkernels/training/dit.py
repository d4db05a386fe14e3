"""Trains a class-conditional diffusion transformer; needs lightning."""

from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from vqkernels.models import EMA, DiT
from vqkernels.training.checkpoint import FORMAT, record
from vqkernels.training.config import DiTConfig
from vqkernels.training.data import Labelled
from vqkernels.training.loop import configure_adamw, seed_step
from vqkernels.training.sampling import build_diffusion, build_model, fused
from vqkernels.training.spaces import Space


class DiTTraining(LightningModule):
    """The model, the moving average of its weights, and its training step; for `vqkernels.training.loop.fit`.

    Args:
        config: of the run.
        space: that the model works in.
        data: images and classes, which are encoded once.

    Raises:
        ValueError: sizes of the configuration do not fit.
    """

    name = "dit"
    x0: Tensor
    labels: Tensor

    def __init__(self, config: DiTConfig, space: Space, data: Labelled) -> None:
        super().__init__()
        self.config, self.space = config, space
        self.diffusion = build_diffusion(config)
        seed_step(config.seed, -1)
        model = build_model(config, space)
        self.average = EMA(model, config.ema_decay, warmup=True)
        self.model = fused(model, config.reference)
        fused(self.averaged_model, config.reference)
        self.register_buffer("x0", space.encode(data.images), persistent=False)
        self.register_buffer("labels", data.labels, persistent=False)

    @property
    def averaged_model(self) -> DiT:
        """The model with the moving average of the weights."""
        return cast(DiT, self.average.module)

    def configure_optimizers(self) -> Any:
        return configure_adamw(self.model.parameters(), self.config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of the batch that belongs to the number of the step."""
        seed_step(self.config.seed, self.global_step)
        chosen = torch.randint(len(self.x0), (self.config.batch_size,)).to(self.device)
        t = self.diffusion.random_times(self.config.batch_size).to(self.device)
        noise = torch.randn(len(chosen), *self.space.shape).to(self.device)
        return self.diffusion.loss(self.model, self.x0[chosen], t, self.labels[chosen], noise=noise)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's, then the moving average, so that a checkpoint of the step has it."""
        super().optimizer_step(*args, **kwargs)
        self.average.update_parameters(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[FORMAT] = record(self.name, self.config, space=self.space.state())
