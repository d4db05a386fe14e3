"""What the demo reports of its two models: agreement, quality and time."""

import copy
import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.cli._twins import NAMES, History, Twins, in_turn, timed, total_loss
from vqkernels.models import VQVAE

QUANTIZER_ROUNDS = 60


def measure(
    twins: Twins, history: History, training: Tensor, held_out: Tensor, *, batch_size: int, seed: int
) -> dict[str, Any]:
    """Everything but the provenance that metrics.json holds; training and held_out are images [N, C, H, W]."""
    agreement = agreement_at_equal_weights(twins, training, held_out, batch_size=batch_size, seed=seed)
    seconds = time_quantizers(twins, training[:batch_size], rounds=QUANTIZER_ROUNDS, seed=seed)
    codes = {name: twins[name].codes(held_out) for name in NAMES}
    metrics: dict[str, Any] = {
        "equal_weights": agreement,
        "trained_apart": {"equal_codes": _share(codes["reference"] == codes["fused"])},
    }
    for name, model in twins.items():
        counts = code_counts(model, training, held_out)
        metrics[name] = {
            "losses": history.losses[name],
            "psnr_db": psnr(held_out, model.reconstruct(held_out)),
            "perplexity": perplexity(counts),
            "used_codes": int((counts > 0).sum()),
            "quantizer_seconds": _summary(seconds[name]),
            "step_seconds": _summary(history.seconds[name]),
        }
    metrics["reference_over_fused"] = {
        key: {kind: metrics["reference"][key][kind] / metrics["fused"][key][kind] for kind in ("minimum", "median")}
        for key in ("quantizer_seconds", "step_seconds")
    }
    return metrics


def agreement_at_equal_weights(
    twins: Twins, training: Tensor, held_out: Tensor, *, batch_size: int, seed: int
) -> dict[str, float]:
    """Compares copies that both have the reference's state: codes of the held-out images, losses in training mode.

    The losses are those of every batch of the training images, each from the same state and seed.
    """
    state = copy.deepcopy(twins["reference"].state_dict())
    variance = training.var()
    codes, losses = {}, {}
    for name, model in copy.deepcopy(twins).items():
        values = []
        for batch in training.split(batch_size):
            model.load_state_dict(state)
            torch.manual_seed(seed)
            values.append(total_loss(model, batch, variance).detach())
        losses[name] = torch.stack(values)
        model.load_state_dict(state)
        codes[name] = model.codes(held_out)
    return {
        "equal_codes": _share(codes["reference"] == codes["fused"]),
        "compared_codes": codes["fused"].numel(),
        "largest_loss_difference": (losses["reference"] - losses["fused"]).abs().max().item(),
        "compared_losses": losses["fused"].numel(),
    }


def time_quantizers(twins: Twins, images: Tensor, *, rounds: int, seed: int) -> dict[str, list[float]]:
    """Seconds of forward, backward and EMA update of each quantizer, in turn, from one state on the same latents."""
    quantizers = {name: copy.deepcopy(twins[name].quantizer) for name in NAMES}
    quantizers["fused"].load_state_dict(quantizers["reference"].state_dict())
    latents = twins["reference"].encode(images).detach().requires_grad_()
    torch.manual_seed(seed)
    grad = torch.randn_like(latents)

    def step(quantizer: nn.Module) -> Tensor:
        latents.grad = None
        quantized, _, loss = quantizer(latents)
        torch.autograd.backward([quantized, loss], [grad, torch.ones_like(loss)])
        return quantized

    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(rounds):
        for name in in_turn(number):
            seconds[name].append(timed(images.device, step, quantizers[name])[0])
    return seconds


def code_counts(model: VQVAE, *images: Tensor) -> Tensor:
    """How often each code is used for images [N, C, H, W], int64 [K]."""
    indices = torch.cat([model.codes(part).flatten() for part in images])
    return torch.bincount(indices, minlength=model.codebook_size)


def psnr(images: Tensor, reconstructions: Tensor) -> float:
    """Peak signal-to-noise ratio, in dB, for images with values from 0 to 1."""
    return -10 * math.log10(F.mse_loss(reconstructions.clamp(0, 1), images).item())


def perplexity(counts: Tensor) -> float:
    """The number of codes that, evenly used, would say as much: exp of the entropy of their use."""
    share = counts.double() / counts.sum()
    return math.exp(-torch.special.xlogy(share, share).sum().item())


def _share(equal: Tensor) -> float:
    return equal.double().mean().item()


def _summary(seconds: list[float]) -> dict[str, float]:
    return {"minimum": min(seconds), "median": statistics.median(seconds)}
