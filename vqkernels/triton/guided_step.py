"""Guidance and one update of a sampler: the formulas of csrc/cpu/guided_step.h."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.reference._checks import FLOAT_TYPES, check_tensor
from vqkernels.triton._checks import check_like
from vqkernels.triton.arithmetic import load_as, narrow

_BLOCK = 1024


@triton.jit
def _number(x: tl.float64, dtype: tl.constexpr) -> tl.tensor:
    """A number that the host has in float64, in the type of the arithmetic."""
    return tl.full((1,), x, dtype)


@triton.jit(
    do_not_specialize=[
        *("output_stride", "unconditional_stride", "noise_stride", "variance_stride", "sample_stride"),
        *("size", "period", "guided", "guidance_scale", "clean_sample", "clean_output", "clip"),
        *("step_sample", "step_clean", "noise_scale", "min_log_variance", "max_log_variance"),
    ]
)
def _guided_step_kernel(
    sample: tl.tensor,  # [rows, size], rows at any stride, as are those of the other inputs
    output: tl.tensor,
    unconditional: tl.tensor,  # or None
    noise: tl.tensor,  # or None
    variance: tl.tensor,  # or None
    following: tl.tensor,  # [rows, size]
    sample_stride: tl.int64,
    output_stride: tl.int64,
    unconditional_stride: tl.int64,
    noise_stride: tl.int64,
    variance_stride: tl.int64,
    size: tl.int64,
    period: tl.int64,
    guided: tl.int64,
    guidance_scale: tl.float64,
    clean_sample: tl.float64,
    clean_output: tl.float64,
    clip: tl.float64,
    step_sample: tl.float64,
    step_clean: tl.float64,
    noise_scale: tl.float64,
    min_log_variance: tl.float64,
    max_log_variance: tl.float64,
    WIDE: tl.constexpr,  # the type of the arithmetic
    ALL_GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks = tl.cdiv(size, BLOCK)
    row = tl.program_id(0).to(tl.int64) // blocks
    i = tl.program_id(0).to(tl.int64) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    x = load_as(sample + row * sample_stride + i, inside, WIDE)
    o = load_as(output + row * output_stride + i, inside, WIDE)
    if unconditional is not None:
        u = load_as(unconditional + row * unconditional_stride + i, inside, WIDE)
        mixed = u + _number(guidance_scale, WIDE) * (o - u)
        o = mixed if ALL_GUIDED else tl.where(i % period < guided, mixed, o)
    clean = _number(clean_sample, WIDE) * x + _number(clean_output, WIDE) * o
    bound = _number(clip, WIDE)
    # Comparisons in this order keep a NaN.
    clean = tl.where(clean > bound, bound, tl.where(clean < -bound, -bound, clean))
    y = _number(step_sample, WIDE) * x + _number(step_clean, WIDE) * clean
    if noise is not None:
        s = _number(noise_scale, WIDE)
        if variance is not None:
            v = load_as(variance + row * variance_stride + i, inside, WIDE)
            slope = _number((max_log_variance - min_log_variance) * 0.25, WIDE)
            s = tl.exp(slope * v + _number((max_log_variance + min_log_variance) * 0.25, WIDE))
        y += s * load_as(noise + row * noise_stride + i, inside, WIDE)
    tl.store(following + row * size + i, narrow(y, following.dtype.element_ty), mask=inside)


def guided_step(
    sample: Tensor,
    output: Tensor,
    unconditional: Tensor | None,
    noise: Tensor | None,
    variance: Tensor | None,
    period: int,
    guided: int,
    *coefficients: float,
) -> Tensor:
    """The next sample [B, N] from rows [B, N]; of every `period` elements of a row the first `guided` are guided."""
    check_tensor("sample", sample, FLOAT_TYPES)
    if sample.ndim != 2:
        raise ValueError(f"sample: expected shape [B, N], got {list(sample.shape)}")
    check_like("output", output, FLOAT_TYPES, sample.shape, "sample", sample)
    torch._check(
        (sample.dtype == torch.float64) == (output.dtype == torch.float64),
        lambda: "vqkernels: expected sample and output both in float64 or neither",
    )
    others = (("unconditional", unconditional, output), ("noise", noise, sample), ("variance", variance, output))
    for name, value, like in others:
        if value is not None:
            check_like(name, value, (like.dtype,), sample.shape, "sample", sample)
    torch._check(
        0 <= guided <= period and (period > 0 or sample.shape[1] == 0),
        lambda: "vqkernels: expected 0 <= guided <= period",
    )
    torch._check(variance is None or noise is not None, lambda: "vqkernels: expected noise with variance")
    rows, size = sample.shape
    following = sample.new_empty(sample.shape)
    if sample.numel() == 0:
        return following
    inputs = [
        t if t is None or size == 1 or t.stride(1) == 1 else t.contiguous()
        for t in (sample, output, unconditional, noise, variance)
    ]
    with torch.cuda.device_of(sample):
        _guided_step_kernel[(rows * triton.cdiv(size, _BLOCK),)](
            *inputs,
            following,
            *(0 if t is None else t.stride(0) for t in inputs),
            size,
            period,
            guided,
            *coefficients,
            WIDE=tl.float64 if sample.dtype == torch.float64 else tl.float32,
            ALL_GUIDED=unconditional is None or guided == period,
            BLOCK=_BLOCK,
        )
    return following
