"""Classifier-free guidance and the update of a diffusion sampler in one pass."""

import math

import torch
from torch import Tensor

from vqkernels import reference
from vqkernels.ops import _backend
from vqkernels.reference._checks import (
    FLOAT_TYPES,
    check_device,
    check_needs,
    check_numbers,
    check_shape,
    check_tensor,
    describe,
)
from vqkernels.reference._memory_formats import has_channels_last


def _shape_rule(
    sample: Tensor,
    output: Tensor,
    unconditional: Tensor | None,
    noise: Tensor | None,
    variance: Tensor | None,
    period: int,
    guided: int,
    *coefficients: float,
) -> Tensor:
    return sample.new_empty(sample.shape)


_backend.define(
    "guided_step(Tensor sample, Tensor output, Tensor? unconditional, Tensor? noise, Tensor? variance, int period, "
    "int guided, float guidance_scale, float clean_sample, float clean_output, float clip, float step_sample, "
    "float step_clean, float noise_scale, float min_log_variance, float max_log_variance) -> Tensor",
    _shape_rule,
    cuda_kernels=False,
)


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
    backend: str | None = None,
) -> Tensor:
    """Guides the output of a denoising model and takes one step of a sampler with it, in one pass over memory.

        guided   = unconditional + guidance_scale (output - unconditional)      the first guided_channels channels
        guided   = output                                                       the other channels
        clean    = to_clean[0] sample + to_clean[1] guided                      clamped to [-clip, clip]
        previous = step[0] sample + step[1] clean + s noise
        s        = noise_scale, or with a variance v: exp(l / 2), l = min + (max - min) (v + 1) / 2

    with log_variance = (min, max) (guidance: Ho and Salimans, arXiv 2207.12598; learned variance: Nichol and Dhariwal,
    arXiv 2102.09672, equation 15).

    Coefficients. With a sample x = sqrt(a) x0 + sqrt(1 - a) epsilon, where a is the cumulative product of 1 - beta at
    this timestep and a' that at the next, less noisy one (1 at the end), `to_clean` follows from what the model
    predicts:

        epsilon     (1 / sqrt(a), -sqrt(1 - a) / sqrt(a))
        v           (sqrt(a), -sqrt(1 - a))             v = sqrt(a) epsilon - sqrt(1 - a) x0 (arXiv 2202.00512)
        x0          (0, 1)

    and with a flow, x = (1 - t) x0 + t epsilon with the velocity epsilon - x0 (arXiv 2209.03003), it is (1, -t); where
    the velocity is x0 - epsilon, (1, t). `step` and the noise follow from the sampler. With b = 1 - a / a':

        DDPM        (sqrt(a / a') (1 - a') / (1 - a), sqrt(a') b / (1 - a))     (arXiv 2006.11239, equation 7)
                    variance b, or b (1 - a') / (1 - a), noise_scale its root; a learned variance lies between
                    the two, whose logarithms are log_variance = (log(b (1 - a') / (1 - a)), log(b))
        DDIM        (q, sqrt(a') - q sqrt(a)), q = sqrt((1 - a' - s^2) / (1 - a))       (arXiv 2010.02502, equation 12)
                    noise_scale s = eta sqrt((1 - a') / (1 - a)) sqrt(b); epsilon is that of the clamped clean sample
        Euler       from t to t' on the path of a flow: (t' / t, 1 - t' / t)

    The last step takes no noise, hence no variance. Computed in float32 (float64 where an argument is) and rounded
    once, to the dtype of the sample. There is no gradient.

    Args:
        sample: [B, C, ...], contiguous or channels-last; float32, float64, bfloat16 or float16.
        output: what the model predicts, the shape of sample, on its device, any of these dtypes. This and the other
            tensors may be views with any stride over the batch, such as `output[:, :C]` of a model with a learned
            variance: nothing is copied as long as single samples lie in memory as those of `sample` do.
        unconditional: the prediction without the condition, like output; None: no guidance.
        guidance_scale: weight of the condition; 1 takes `output` alone.
        guided_channels: how many channels are guided, from 0 to C; None: all.
        to_clean: coefficients of sample and prediction in the clean sample.
        clip: bound of the clean sample's absolute values, above 0; None: none.
        step: coefficients of sample and clean sample in the result.
        noise: standard normal numbers, the shape of sample; None: none are added.
        noise_scale: standard deviation of the noise.
        variance: the learned v, in [-1, 1] from min to max, the shape of sample; noise_scale is 0 then.
        log_variance: the logarithms of the least and the largest variance, with variance.
        backend: None (what suits the device), "native", "triton" or "reference".

    Returns:
        The sample at the next timestep: shape, dtype and memory format of `sample`.

    Raises:
        TypeError: an argument has an unexpected type or dtype.
        ValueError: shapes, devices, numbers or backend do not fit, or an argument is given that another one lacks.
        RuntimeError: a gradient is asked for, or the backend asked for cannot serve the call.
    """
    tensors = _given_tensors(sample, output, unconditional=unconditional, noise=noise, variance=variance)
    _check_guidance(sample.shape[1], unconditional, guidance_scale, guided_channels)
    _check_step(to_clean, clip, step, noise, noise_scale, variance, log_variance)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError("guided_step has no gradient: call it under torch.no_grad(), or detach its arguments")
    backend = _backend.resolve(backend, sample, cuda_kernels=False)
    if backend == "reference":
        return reference.guided_step(
            sample,
            output,
            unconditional,
            guidance_scale=guidance_scale,
            guided_channels=guided_channels,
            to_clean=to_clean,
            clip=clip,
            step=step,
            noise=noise,
            noise_scale=noise_scale,
            variance=variance,
            log_variance=log_variance,
        )
    channels, spatial = sample.shape[1], sample.shape[2:]
    positions = math.prod(spatial)
    channels_last = has_channels_last(sample)
    states, outputs = _of_one_type([sample, noise], [output, unconditional, variance])
    x, noise_rows, *others = (
        None if t is None else (t.movedim(1, -1) if channels_last else t).flatten(1) for t in (*states, *outputs)
    )
    prediction, unconditional_rows, variance_rows = others
    guided = channels if guided_channels is None else guided_channels
    low, high = (0.0, 0.0) if log_variance is None else log_variance
    bound = math.inf if clip is None else clip
    coefficients = (guidance_scale, *to_clean, bound, *step, noise_scale, low, high)
    previous = _backend.implementation("guided_step", backend)(
        x,
        prediction,
        unconditional_rows,
        noise_rows,
        variance_rows,
        *((channels, guided) if channels_last else (channels * positions, guided * positions)),
        *map(float, coefficients),
    ).to(sample.dtype)
    if channels_last:
        return previous.reshape(sample.shape[0], *spatial, channels).movedim(-1, 1)
    return previous.reshape(sample.shape)


def _check_pair(name: str, value: object) -> None:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name}: expected two numbers, got {describe(value)}")
    for i in range(2):
        check_numbers(**{f"{name}[{i}]": value[i]})


def _given_tensors(sample: Tensor, output: Tensor, **others: Tensor | None) -> list[Tensor]:
    given = {"sample": sample, "output": output} | {name: t for name, t in others.items() if t is not None}
    for name, t in given.items():
        check_tensor(name, t, FLOAT_TYPES)
    if sample.ndim < 2 or sample.shape[1] == 0:
        raise ValueError(f"sample: expected shape [B, C, ...] with C at least 1, got {list(sample.shape)}")
    for name, t in given.items():
        check_shape(name, t, sample.shape, "sample", sample)
        check_device(name, t, "sample", sample)
    return list(given.values())


def _check_guidance(
    channels: int, unconditional: Tensor | None, guidance_scale: float, guided_channels: int | None
) -> None:
    check_numbers(guidance_scale=guidance_scale)
    if unconditional is None and guidance_scale != 1:
        raise ValueError(f"guidance_scale: expected 1 without unconditional, got {guidance_scale!r}")
    if guided_channels is None:
        return
    if isinstance(guided_channels, bool) or not isinstance(guided_channels, int | torch.SymInt):
        raise TypeError(f"guided_channels: expected None or an integer, got {describe(guided_channels)}")
    if not 0 <= guided_channels <= channels:
        raise ValueError(f"guided_channels: expected an integer from 0 to {channels}, got {guided_channels}")


def _check_step(
    to_clean: tuple[float, float],
    clip: float | None,
    step: tuple[float, float],
    noise: Tensor | None,
    noise_scale: float,
    variance: Tensor | None,
    log_variance: tuple[float, float] | None,
) -> None:
    _check_pair("to_clean", to_clean)
    _check_pair("step", step)
    check_numbers(noise_scale=noise_scale)
    if clip is not None:
        check_numbers(clip=clip)
        if not clip > 0:
            raise ValueError(f"clip: expected a number above 0, got {clip!r}")
    if noise_scale != 0 and (noise is None or variance is not None):
        condition = "without noise" if noise is None else "with variance"
        raise ValueError(f"noise_scale: expected 0 {condition}, got {noise_scale!r}")
    if (variance is None) != (log_variance is None):
        raise ValueError("variance, log_variance: expected both of them or neither, got one")
    if log_variance is not None:
        _check_pair("log_variance", log_variance)
        check_needs("variance", True, noise=noise is not None)


def _of_one_type(*groups: list[Tensor | None]) -> list[list[Tensor | None]]:
    """Each group in one dtype, and all in float64 where one tensor is."""
    dtypes = [{t.dtype for t in group if t is not None} for group in groups]
    if torch.float64 in set.union(*dtypes):
        dtypes = [{torch.float64}] * len(groups)
    return [
        [t if t is None else t.to(next(iter(types)) if len(types) == 1 else torch.float32) for t in group]
        for group, types in zip(groups, dtypes, strict=True)
    ]
