"""Samplers of diffusion models and flows. Every update is one `guided_step`, with coefficients in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqkernels.models.diffusion import Diffusion
from vqkernels.ops import guided_step
from vqkernels.reference._checks import FLOAT_TYPES, check_tensor

METHODS = ("ddpm", "ddim", "euler", "heun")

Report = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Level:
    """A noise level x = a x0 + s epsilon, and the timestep that the model is told; data are at a = 1, s = 0."""

    a: float
    s: float
    t: int | float


@torch.no_grad()
def sample(
    diffusion: Diffusion,
    model: Callable[..., Tensor],
    shape: tuple[int, ...],
    *,
    method: str = "ddpm",
    steps: int = 250,
    y: Tensor | None = None,
    guidance_scale: float = 1.0,
    guided_channels: int | None = None,
    null_label: int | None = None,
    eta: float = 0.0,
    clip: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    start: tuple[Tensor, float] | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    report: Report | None = None,
) -> Tensor:
    """Draws data with a model, from noise or from given data.

    "ddpm" draws from the model's posterior (arXiv 2006.11239), with the learned variance where there is one and else
    with that of the posterior. "ddim" is arXiv 2010.02502, with a share `eta` of that noise. "euler" solves the
    probability-flow equation, dz = (epsilon - x0) du with z = x / (a + s) and u = s / (a + s), which is a flow's own
    and for a diffusion gives "ddim" without noise; "heun" does it to the second order, with two calls of the model a
    step but the last (arXiv 2206.00364, in another variable: this one is bounded where there is no signal).

    A diffusion takes `steps` of its timesteps, evenly spaced; a flow goes from s = 1 to 0 in equal steps. With guidance
    the model is called once for the batch with and without label. Put it into evaluation mode before, so that it does
    not drop labels.

    Args:
        diffusion: the process, which says what the model predicts.
        model: called as model(x, t, y), with t [B] and y [B], or as model(x, t) without y; see `Diffusion.losses`.
        shape: [B, C, ...] of the result.
        method: "ddpm" (not for a flow), "ddim", "euler" or "heun".
        steps: at most T of a diffusion.
        y: labels, int64 [B].
        guidance_scale: of classifier-free guidance (arXiv 2207.12598), unconditional + scale (conditional -
            unconditional); 1: none.
        guided_channels: the first channels, that are guided; None: all. The variance is not.
        null_label: the label of "no class"; None: `model.num_classes`.
        eta: share of the posterior's noise in "ddim", from 0 to 1; 0 for the other methods.
        clip: bound of the predicted x0, to which it is clamped; None: it is not.
        generator: of all noise, which is drawn on the generator's device: that of a CPU draws the same for any device.
        device: of the result; None: that of y, start or known, or else the CPU.
        start: (data, level) to begin with instead of noise: floating-point data, to be expanded to `shape`, noised so
            that `level` of the steps are left, above 0 and at most 1.
        known: (data, mask), each to be expanded to `shape`: where the boolean mask is True the sample is data, noised
            as far as each step goes, and at the end as they are (arXiv 2201.09865). Methods that draw noise draw it
            anew for every step; the others keep that of the beginning.
        report: called after every step as report(done, total, sample).

    Returns:
        float32, of `shape`.

    Raises:
        TypeError: data or a mask has an unexpected type or dtype.
        ValueError: an argument does not fit.
    """
    _check(diffusion, shape, method, steps, y, guidance_scale, eta, start)
    if device is None:
        tensors = [y, *(pair[0] for pair in (start, known) if pair is not None)]
        device = next((t.device for t in tensors if t is not None), torch.device("cpu"))
    y = None if y is None else y.to(device)
    levels = _levels(diffusion, steps)
    variances = diffusion.log_variances([level.a for level in reversed(levels[:-1])])[::-1] if method == "ddpm" else []

    def draw() -> Tensor:
        noise_device = device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=noise_device).to(device)

    def call(x: Tensor, level: Level) -> Tensor:
        dtype = torch.float32 if diffusion.is_flow else torch.int64
        t = torch.full(shape[:1], level.t, dtype=dtype, device=device)
        if y is None:
            return model(x, t)
        if guidance_scale == 1:
            return model(x, t, y)
        labels = torch.cat([y, torch.full_like(y, _null_label(model, null_label))])
        return model(torch.cat([x, x]), torch.cat([t, t]), labels)

    def update(x: Tensor, output: Tensor, level: Level, **arguments: Any) -> Tensor:
        output, *rest = output.chunk(2) if guidance_scale != 1 else (output,)
        channels = shape[1]
        if diffusion.learned_sigma:
            if "log_variance" in arguments:
                arguments["variance"] = output[:, channels:].float()
            output, *rest = (part[:, :channels] for part in (output, *rest))
        return guided_step(
            x,
            output.float(),
            rest[0].float() if rest else None,
            guidance_scale=guidance_scale,
            guided_channels=guided_channels,
            to_clean=diffusion.to_clean(level.a, level.s),
            clip=clip,
            **arguments,
        )

    first = 0
    x = noise = draw()
    if start is not None:
        first = steps - max(1, round(start[1] * steps))
        x = _noised(_expanded("start", start[0], shape, FLOAT_TYPES).to(device, torch.float32), levels[first], noise)
    is_random = method == "ddpm" or (method == "ddim" and eta > 0)
    if known is not None:
        data = _expanded("known[0]", known[0], shape, FLOAT_TYPES).to(device, torch.float32)
        mask = _expanded("known[1]", known[1], shape, (torch.bool,)).to(device)
        x = torch.where(mask, _noised(data, levels[first], noise), x)
    for i in range(first, steps):
        level, following = levels[i], levels[i + 1]
        output = call(x, level)
        if method == "ddpm":
            k, m, variance = diffusion.posterior(level.a, following.a)
            if following.s == 0:
                noise_arguments: dict[str, Any] = {}
            elif diffusion.learned_sigma:
                noise_arguments = {"noise": draw(), "log_variance": variances[i]}
            else:
                noise_arguments = {"noise": draw(), "noise_scale": math.sqrt(variance)}
            x = update(x, output, level, step=(k, m), **noise_arguments)
        elif method == "heun" and following.s > 0:
            predicted = update(x, output, level, step=_to_level(level, following))
            output = call(predicted, following)
            x = update(predicted, output, following, **_heun(level, following, x))
        else:
            deviation = _ddim_deviation(level, following, eta) if is_random else 0.0
            noise_arguments = {"noise": draw(), "noise_scale": deviation} if deviation else {}
            x = update(x, output, level, step=_to_level(level, following, deviation), **noise_arguments)
        if known is not None:
            known_noise = draw() if is_random and following.s > 0 else noise
            x = torch.where(mask, _noised(data, following, known_noise), x)
        if report is not None:
            report(i - first + 1, steps - first, x)
    return x


def _check(
    diffusion: Diffusion,
    shape: tuple[int, ...],
    method: str,
    steps: int,
    y: Tensor | None,
    guidance_scale: float,
    eta: float,
    start: tuple[Tensor, float] | None,
) -> None:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method == "ddpm" and diffusion.is_flow:
        raise ValueError("method: expected ddim, euler or heun for a flow, got 'ddpm'")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if len(shape) < 2:
        raise ValueError(f"shape: expected [B, C, ...], got {list(shape)}")
    if y is None and guidance_scale != 1:
        raise ValueError(f"guidance_scale: expected 1 without labels y, got {guidance_scale}")
    if y is not None and y.shape != shape[:1]:
        raise ValueError(f"y: expected shape [{shape[0]}], got {list(y.shape)}")
    if not 0 <= eta <= (method == "ddim"):
        expected = "a number from 0 to 1" if method == "ddim" else f"0 for {method}"
        raise ValueError(f"eta: expected {expected}, got {eta}")
    if start is not None and not 0 < start[1] <= 1:
        raise ValueError(f"start: expected a level above 0 and at most 1, got {start[1]}")


def _expanded(name: str, value: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
    check_tensor(name, value, dtypes)
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name}: expected a shape that expands to {list(shape)}, got {list(value.shape)}") from None


def _levels(diffusion: Diffusion, steps: int) -> list[Level]:
    """From the most noise to data, steps + 1 of them."""
    if diffusion.is_flow:
        noises = [1 - i / steps for i in range(steps)]
        levels = [Level(1 - s, s, diffusion.timesteps * s) for s in noises]
    else:
        signal = diffusion.signal.tolist()
        levels = [Level(signal[t], math.sqrt(1 - signal[t] ** 2), t) for t in reversed(diffusion.respaced(steps))]
    return [*levels, Level(1.0, 0.0, 0)]


def _to_level(level: Level, following: Level, deviation: float = 0.0) -> tuple[float, float]:
    """(k, m) of the next sample k x + m x0 with the same epsilon, of which `deviation` is left to new noise."""
    k = math.sqrt(following.s**2 - deviation**2) / level.s
    return k, following.a - k * level.a


def _ddim_deviation(level: Level, following: Level, eta: float) -> float:
    """Of the new noise: eta times that of the posterior of a diffusion (arXiv 2010.02502, equation 16)."""
    ratio = (level.a * following.s / (following.a * level.s)) ** 2
    return eta * math.sqrt(max(0.0, following.s**2 - ratio * following.s**2))


def _heun(level: Level, following: Level, x: Tensor) -> dict[str, Any]:
    """The second half of a step from x: arguments of `guided_step` for the sample that Euler's step has predicted.

    On the line z = x / (a + s) = (1 - u) x0 + u epsilon, u = s / (a + s), the slope epsilon - x0 at the prediction is
    (z' - x0) / u', and the step z + h (slope + slope') / 2 = z / 2 + z' / 2 + h slope' / 2, h = u' - u: x comes in
    where noise does.
    """
    length, following_length = level.a + level.s, following.a + following.s
    u, following_u = level.s / length, following.s / following_length
    half = (following_u - u) / (2 * following_u)
    return {
        "step": (0.5 + half, -half * following_length),
        "noise": x,
        "noise_scale": 0.5 * following_length / length,
    }


def _noised(data: Tensor, level: Level, noise: Tensor) -> Tensor:
    return level.a * data + level.s * noise


def _null_label(model: Callable[..., Tensor], null_label: int | None) -> int:
    label = getattr(model, "num_classes", None) if null_label is None else null_label
    if label is None:
        raise ValueError("null_label: expected an integer for a model without num_classes, got None")
    return label
