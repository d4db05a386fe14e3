"""Gaussian diffusion and rectified flow: noise levels, what a model predicts, and its loss."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SCHEDULES = ("linear", "cosine")
PREDICTIONS = ("epsilon", "v", "x0", "flow")


class Diffusion:
    """How data become noise, x = a x0 + s epsilon, and what a model learns to predict of it.

    A diffusion has the timesteps t = 0, ..., timesteps - 1 with a^2 the product of 1 - beta up to t, s^2 = 1 - a^2. A
    flow has every level s from 0 to 1, a = 1 - s (arXiv 2209.03003); the model is given t = timesteps s, in float32.
    Predictions are epsilon (arXiv 2006.11239), v = a epsilon - s x0 (arXiv 2202.00512), x0, or for a flow the velocity
    epsilon - x0.

    With a learned sigma the model has as many channels again, a fraction u from -1 to 1 of the logarithm of the
    variance, between the posterior's (-1) and beta's (1), learned from the variational bound (arXiv 2102.09672).

    Args:
        timesteps: T.
        schedule: "linear", betas from 1e-4 to 0.02 at T = 1000 and as much noise in all at another (arXiv 2006.11239);
            or "cosine", a^2 proportional to cos(((t + 1) / T + 0.008) / 1.008 pi / 2)^2 (arXiv 2102.09672). Betas are
            at most 0.999. A flow does not look at it.
        prediction: "epsilon", "v", "x0" or "flow".
        learned_sigma: the model predicts u.

    Attributes:
        signal: a of every timestep, float64 [T]; a flow has none.

    Raises:
        ValueError: timesteps is below 1, a name is none of these, or sigma is to be learned for a flow.
    """

    def __init__(
        self,
        timesteps: int = 1000,
        schedule: str = "linear",
        prediction: str = "epsilon",
        learned_sigma: bool = False,
    ) -> None:
        for name, value, choices in (("schedule", schedule, SCHEDULES), ("prediction", prediction, PREDICTIONS)):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        if timesteps < 1:
            raise ValueError(f"timesteps: expected at least 1, got {timesteps}")
        if learned_sigma and prediction == "flow":
            raise ValueError("learned_sigma: expected False for a flow, got True")
        self.timesteps = timesteps
        self.schedule = schedule
        self.prediction = prediction
        self.learned_sigma = learned_sigma
        self.is_flow = prediction == "flow"
        if not self.is_flow:
            betas = _linear_betas(timesteps) if schedule == "linear" else _cosine_betas(timesteps)
            self.signal = (1 - betas).cumprod(0).sqrt()
            self._posteriors = self._posterior_table()

    def random_times(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Times for training, uniform: int64 [count], or float32 from 0 to T for a flow; on the generator's device."""
        device = None if generator is None else generator.device
        if self.is_flow:
            return torch.rand(count, generator=generator, device=device) * self.timesteps
        return torch.randint(self.timesteps, (count,), generator=generator, device=device)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of timesteps, float64, the shape of t.

        Raises:
            IndexError: there is no such timestep (on CPU, where looking waits for nothing).
        """
        if self.is_flow:
            noise = t.double() / self.timesteps
            return 1 - noise, noise
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = t[(t < 0) | (t >= self.timesteps)]
            if len(outside):
                raise IndexError(f"t: expected timesteps from 0 to {self.timesteps - 1}, got {outside[0].item()}")
        squared = self.signal.to(t.device)[t] ** 2
        return squared.sqrt(), (1 - squared).sqrt()

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Data with noise, a x0 + s noise: [B, C, ...], in the dtype of x0, at timesteps t [B]."""
        a, s = self._levels_like(x0, t)
        return a * x0 + s * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What a model should predict of `noised(x0, t, noise)`."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x0
        if self.is_flow:
            return noise - x0
        a, s = self._levels_like(x0, t)
        return a * noise - s * x0

    def to_clean(self, a: Any, s: Any) -> tuple[Any, Any]:
        """(k, m) such that x0 = k x + m prediction at levels a and s, floats or tensors."""
        if self.prediction == "epsilon":
            return 1 / a, -s / a
        return {"v": (a, -s), "x0": (0.0, 1.0), "flow": (1.0, -s)}[self.prediction]

    def loss(
        self,
        model: Callable[..., Tensor],
        x0: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        vlb_weight: float = 1e-3,
        **model_arguments: Any,
    ) -> Tensor:
        """The loss of a batch, a scalar: the mean of `losses`, whose arguments these are."""
        return self.losses(model, x0, t, y, noise=noise, vlb_weight=vlb_weight, **model_arguments).mean()

    def losses(
        self,
        model: Callable[..., Tensor],
        x0: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        vlb_weight: float = 1e-3,
        **model_arguments: Any,
    ) -> Tensor:
        """Squared errors of the prediction, and with a learned sigma vlb_weight T times the term of the bound at t.

        The bound (arXiv 2102.09672, section 3.1) teaches the variance alone: the mean is detached. 1e-3 is published.

        Args:
            model: called as model(x, t, y, **model_arguments), or without y where that is None.
            x0: data [B, C, ...], scaled to [-1, 1]: at t = 0 the bound takes them for 8-bit numbers.
            t: timesteps [B], see `random_times`.
            y: labels.
            noise: the shape of x0; None: standard normal, from torch's generator.
            vlb_weight: weight of the bound, which is a sum of T terms.
            **model_arguments: for the model.

        Returns:
            float32 [B], means over the elements of x0.

        Raises:
            ValueError: the shape of t, of noise or of the model's output does not fit.
        """
        if t.shape != x0.shape[:1]:
            raise ValueError(f"t: expected shape [{x0.shape[0]}], got {list(t.shape)}")
        if noise is not None and noise.shape != x0.shape:
            raise ValueError(f"noise: expected shape {list(x0.shape)}, got {list(noise.shape)}")
        noise = torch.randn_like(x0) if noise is None else noise
        x = self.noised(x0, t, noise)
        output = model(x, t, **model_arguments) if y is None else model(x, t, y, **model_arguments)
        channels = x0.shape[1]
        expected = [x0.shape[0], 2 * channels if self.learned_sigma else channels, *x0.shape[2:]]
        if list(output.shape) != expected:
            raise ValueError(f"model: expected an output of shape {expected}, got {list(output.shape)}")
        prediction, fraction = output[:, :channels].float(), output[:, channels:].float()
        losses = (prediction - self.target(x0, t, noise).float()).square().flatten(1).mean(1)
        if self.learned_sigma:
            bound = self.bound_terms(x0, x, t, prediction.detach(), fraction)
            losses = losses + vlb_weight * self.timesteps * bound
        return losses

    def bound_terms(self, x0: Tensor, x: Tensor, t: Tensor, prediction: Tensor, fraction: Tensor) -> Tensor:
        """The term of the variational bound at timestep t [B], in bits a dimension: [B], float32.

        KL divergence of the posterior from the model's step, or at t = 0 the negative log-likelihood of x0 on 255 steps
        from -1 to 1. The predicted x0 is not clamped.
        """
        if self.is_flow:
            raise ValueError("bound_terms: expected a diffusion, got a flow")
        k, m = self.to_clean(*self._levels_like(x0.double(), t))
        from_x, from_clean, low, high = (_like(x0.float(), c) for c in self._posteriors.to(t.device)[t].unbind(-1))
        x0, x = x0.float(), x.float()
        clean = (k * x + m * prediction).float()
        log_variance = low + (high - low) * (fraction + 1) / 2
        difference = from_clean * (x0 - clean)
        divergence = 0.5 * (
            log_variance - low + (low - log_variance).exp() - 1 + difference.square() * (-log_variance).exp()
        )
        likelihood = _log_likelihood(x0, from_x * x + from_clean * clean, log_variance)
        terms = torch.where(_like(x0, t) == 0, -likelihood, divergence)
        return terms.flatten(1).mean(1) / math.log(2)

    def respaced(self, steps: int) -> list[int]:
        """`steps` of the T timesteps, ascending, evenly spaced from 0 to T - 1 as in arXiv 2102.09672.

        Raises:
            ValueError: there are not so many, or this is a flow.
        """
        if self.is_flow:
            raise ValueError("respaced: expected a diffusion, a flow has no timesteps to choose from")
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps: expected from 1 to {self.timesteps}, got {steps}")
        if steps == 1:
            return [self.timesteps - 1]
        return [round(i * (self.timesteps - 1) / (steps - 1)) for i in range(steps)]

    def posterior(self, a: float, previous_a: float) -> tuple[float, float, float]:
        """(k, m, variance) of q(previous x | x, x0) = N(k x + m x0, variance), from level a to previous_a.

        arXiv 2006.11239, equation 7, with 1 - beta = (a / previous_a)^2.
        """
        ratio = (a / previous_a) ** 2
        noise, previous_noise = 1 - a**2, 1 - previous_a**2
        beta = 1 - ratio
        return math.sqrt(ratio) * previous_noise / noise, previous_a * beta / noise, beta * previous_noise / noise

    def log_variances(self, levels: Sequence[float]) -> list[tuple[float, float]]:
        """The range of a learned log variance, (log posterior variance, log beta), at each level a, descending.

        The variance of the first posterior is 0: it has the second's, as published (beta, where there is no second).
        """
        pairs = list(zip((1.0, *levels[:-1]), levels, strict=True))
        betas = [1 - (a / previous) ** 2 for previous, a in pairs]
        variances = [self.posterior(a, previous)[2] for previous, a in pairs]
        variances[0] = variances[1] if len(variances) > 1 else betas[0]
        return [(math.log(v), math.log(b)) for v, b in zip(variances, betas, strict=True)]

    def _posterior_table(self) -> Tensor:
        """posterior(...)[:2] and log_variances(...) of every timestep, float64 [T, 4]."""
        levels = self.signal.tolist()
        means = [self.posterior(a, previous)[:2] for previous, a in zip((1.0, *levels[:-1]), levels, strict=True)]
        rows = [[*mean, *logs] for mean, logs in zip(means, self.log_variances(levels), strict=True)]
        return torch.tensor(rows, dtype=torch.float64)

    def _levels_like(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a, s = self.levels(t)
        return _like(x, a), _like(x, s)


def _like(x: Tensor, values: Tensor) -> Tensor:
    """Values [B] over x [B, ...], in its dtype."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Of values on 255 steps from -1 to 1 under a normal distribution cut at their middles, elementwise."""
    half_step, inverse_deviation = 1 / 255, (-0.5 * log_variance).exp()
    difference = x - mean
    # Of the two tails the one that is small, so that no digits cancel; the outermost steps have no outer edge.
    outwards = torch.where(x > 0.999, difference, torch.where(x < -0.999, -difference, difference.abs()))
    inner, outer = ((outwards + side) * inverse_deviation * math.sqrt(0.5) for side in (-half_step, half_step))
    share = 0.5 * (torch.erfc(inner) - torch.erfc(outer).masked_fill(x.abs() > 0.999, 0))
    return share.clamp(min=1e-12).log()


def _linear_betas(timesteps: int) -> Tensor:
    scale = 1000 / timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64).clamp(max=0.999)


def _cosine_betas(timesteps: int) -> Tensor:
    squared = torch.cos((torch.arange(timesteps + 1, dtype=torch.float64) / timesteps + 0.008) / 1.008 * math.pi / 2)
    squared = squared.square()
    return (1 - squared[1:] / squared[:-1]).clamp(max=0.999)
