"""Builds the reference and the fused VQ-VAE and trains them side by side."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import vqkernels.nn
from vqkernels import reference
from vqkernels.models import VQVAE

NAMES = ("reference", "fused")

Twins = dict[str, VQVAE]


class History(NamedTuple):
    """One value a step, of each twin."""

    losses: dict[str, list[float]]
    seconds: dict[str, list[float]]


def build(codebook_size: int, seed: int, device: torch.device) -> Twins:
    """A small VQ-VAE for 8x8 digits, twice, with the same initial weights.

    The averages are shorter than published, and codes that fall out of use are revived, since the run is short.
    """
    quantizers: dict[str, type[reference.VectorQuantize]] = {
        "reference": reference.VectorQuantize,
        "fused": vqkernels.nn.VectorQuantize,
    }
    twins = {}
    for name in NAMES:
        torch.manual_seed(seed)
        twins[name] = VQVAE(
            in_channels=1,
            hidden_channels=64,
            downsamplings=1,
            codebook_size=codebook_size,
            codebook_dim=64,
            decay=0.95,
            quantizer=quantizers[name],
            threshold_ema_dead_code=1,
        ).to(device)
    twins["fused"].load_state_dict(twins["reference"].state_dict())
    return twins


def total_loss(model: VQVAE, images: Tensor, variance: Tensor) -> Tensor:
    """The loss of a training step: mean squared error over the variance of the data, plus the quantizer's loss."""
    output = model(images)
    return F.mse_loss(output.reconstruction, images) / variance + output.loss


def train(
    twins: Twins, images: Tensor, *, steps: int, batch_size: int, seed: int, report: Callable[[dict[str, float]], None]
) -> History:
    """Trains both on the same random batches, one step of each in turn; report gets the losses of every step."""
    history = History({name: [] for name in NAMES}, {name: [] for name in NAMES})
    optimizers = {name: torch.optim.Adam(twins[name].parameters(), lr=2e-3) for name in NAMES}
    batches = torch.Generator().manual_seed(seed)
    variance = images.var()

    def step(name: str, batch: Tensor) -> Tensor:
        loss = total_loss(twins[name], batch, variance)
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()
        return loss.detach()

    for number in range(steps):
        batch = images[torch.randint(len(images), (batch_size,), generator=batches).to(images.device)]
        for name in in_turn(number):
            torch.manual_seed(seed + number)
            seconds, loss = timed(images.device, step, name, batch)
            history.losses[name].append(loss.item())
            history.seconds[name].append(seconds)
        report({name: history.losses[name][-1] for name in NAMES})
    return history


def in_turn(number: int) -> tuple[str, ...]:
    """The order of the twins in a round: whoever goes second finds warm caches, so that they take turns."""
    return NAMES if number % 2 == 0 else NAMES[::-1]


def timed(device: torch.device, function: Callable[..., Tensor], *args: Any) -> tuple[float, Tensor]:
    """Seconds until the work of a call on a device is done, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result
