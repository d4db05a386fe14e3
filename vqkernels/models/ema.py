"""Moving averages of the weights of a model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class EMA(AveragedModel):
    """A copy of a model, `module`, whose parameters follow those of the model: torch's `AveragedModel`.

        average = decay average + (1 - decay) parameter

    at every `update_parameters(model)`; the first one copies, and buffers are always copied. With warm-up the decay
    after n updates is min(decay, (1 + n) / (10 + n)), so that the average forgets where the model started. Calling it
    calls the copy; the state_dict holds it and the number of updates, and goes on where it stopped.

    Args:
        model: copied; its parameters have one dtype and device each.
        decay: from 0 to below 1.
        warmup: begin with a smaller decay.

    Raises:
        ValueError: decay is out of range.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, *, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number from 0 to below 1, got {decay}")
        self.decay = decay
        self.warmup = warmup
        super().__init__(model, multi_avg_fn=self._average)
        self.requires_grad_(False)

    @torch.no_grad()
    def _average(self, averages: Sequence[Tensor], parameters: Sequence[Tensor], updates: Tensor | int) -> Any:
        decay = self.decay
        if self.warmup:
            n = int(updates)
            decay = min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(averages), list(parameters), 1 - decay)
