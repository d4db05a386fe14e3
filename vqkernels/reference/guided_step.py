"""Guidance and one update of a diffusion sampler in tensor operations."""

import torch
from torch import Tensor


def guided_step(
    sample: Tensor,
    output: Tensor,
    unconditional: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    guided_channels: int | None = None,
    to_clean: tuple[float, float],
    clip: float | None = None,
    step: tuple[float, float],
    noise: Tensor | None = None,
    noise_scale: float = 0.0,
    variance: Tensor | None = None,
    log_variance: tuple[float, float] | None = None,
) -> Tensor:
    """See `vqkernels.guided_step`."""
    tensors = [t for t in (sample, output, unconditional, noise, variance) if t is not None]
    wide = torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32
    x, out = sample.to(wide), output.to(wide)
    if unconditional is not None:
        guided = unconditional.to(wide) + guidance_scale * (out - unconditional.to(wide))
        channels = sample.shape[1] if guided_channels is None else guided_channels
        out = torch.cat([guided[:, :channels], out[:, channels:]], 1)
    clean = to_clean[0] * x + to_clean[1] * out
    if clip is not None:
        clean = clean.clamp(-clip, clip)
    previous = step[0] * x + step[1] * clean
    if variance is not None:
        assert noise is not None
        assert log_variance is not None
        low, high = log_variance
        scale = (0.5 * (low + (high - low) * (0.5 * variance.to(wide) + 0.5))).exp()
        previous = previous + scale * noise.to(wide)
    elif noise is not None:
        previous = previous + noise_scale * noise.to(wide)
    return previous.to(sample.dtype)
