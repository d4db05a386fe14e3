"""Triton's step of a sampler: against the formula in float64."""

import re

import pytest
import torch
from budget import assert_within_budget

import vqkernels
from vqkernels.triton.guided_step import guided_step

NUMBERS = {"guidance_scale": 4.0, "to_clean": (1.25, -0.75), "clip": 1.3, "step": (0.6, 0.39)}
VARIANCE = (-4.5, -0.3)


def expression(sample, output, unconditional, noise, variance, period, guided, dtype):
    """The formula on rows [B, N] in a dtype."""
    x, o, u, e, v = (t if t is None else t.to(dtype) for t in (sample, output, unconditional, noise, variance))
    if u is not None:
        o = torch.where(torch.arange(x.shape[1]) % period < guided, u + 4.0 * (o - u), o)
    clean = (1.25 * x - 0.75 * o).clamp(-1.3, 1.3)
    s = 0.8 if v is None else (0.5 * (VARIANCE[0] + (VARIANCE[1] - VARIANCE[0]) * (v + 1) / 2)).exp()
    return 0.6 * x + 0.39 * clean + (0 if e is None else s * e)


def coefficients():
    return (4.0, *NUMBERS["to_clean"], NUMBERS["clip"], *NUMBERS["step"], 0.8, *VARIANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_formula(dtype, device):
    for rows, size, period, guided in ((3, 40, 40, 30), (1, 2050, 5, 3), (2, 7, 7, 7), (2, 1, 1, 0), (2, 12, 4, 0)):
        sample, output, u, e, v = torch.randn(5, rows, size).to(dtype)
        for others in ((None, None, None), (u, None, None), (None, e, None), (u, e, v), (None, e, v)):
            actual = guided_step(
                *(t if t is None else t.to(device) for t in (sample, output, *others)), period, guided, *coefficients()
            )
            wanted = [expression(sample, output, *others, period, guided, d) for d in (dtype, torch.float64)]
            if dtype == torch.float64:
                assert (actual.cpu() - wanted[1]).abs().max() <= 2.0**-52 * 8 * wanted[1].abs().max().clamp(min=1)
            else:
                assert_within_budget(actual.cpu(), *wanted)


@pytest.mark.parametrize("channels_last", [False, True])
def test_public_function(channels_last, device):
    """Views of a model's output, partly guided, of another dtype than the sample."""
    sample, noise = torch.randn(2, 3, 4, 6, 5)
    whole = torch.randn(6, 8, 6, 5).bfloat16()
    if channels_last:
        sample, whole = (t.contiguous(memory_format=torch.channels_last) for t in (sample, whole))
    options = NUMBERS | {"guided_channels": 3, "log_variance": VARIANCE}
    tensors = [t.to(device) for t in (sample, whole[:3, :4], whole[3:, :4], noise, whole[:3, 4:])]
    given = dict(zip(("sample", "output", "unconditional", "noise", "variance"), tensors, strict=True))
    actual = vqkernels.guided_step(**given, **options, backend="triton")
    assert actual.stride() == tensors[0].stride()
    wide = {name: t.double() for name, t in given.items()}
    truth = vqkernels.guided_step(**wide, **options, backend="reference")
    assert ((actual - truth).abs() <= 2.0**-23 * 8 * (truth.abs() + 16)).all()


def test_nan_and_empty(device):
    rows = torch.randn(5, 2, 9, device=device)
    rows[1, 1, 3] = torch.nan
    assert guided_step(*rows, 9, 9, *coefficients()).isnan().nonzero().tolist() == [[1, 3]]
    for shape in ((0, 4), (2, 0)):
        empty = torch.zeros(shape, device=device)
        assert guided_step(empty, empty, empty, empty, empty, 4, 4, *coefficients()).shape == shape


def test_direct_calls_check_shapes(device):
    x = torch.zeros(2, 12, device=device)
    for place, name in enumerate(("output", "unconditional", "noise", "variance"), 1):
        arguments = [x, x, x, x, x]
        arguments[place] = x[:1]
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            guided_step(*arguments, 12, 12, *coefficients())
    for arguments in (
        (x, x, x, None, None, 12, 13),
        (x, x, None, None, x, 12, 12),
        (x, x.double(), None, None, None, 12, 12),
        (x, x, x, None, None, 0, 0),
    ):
        with pytest.raises(RuntimeError, match="vqkernels: expected"):
            guided_step(*arguments, *coefficients())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_compiles(capability, dtype, compiled):
    programs = compiled(capability)
    x = torch.zeros(2, 48, dtype=dtype)
    for others in ((None, None, None), (x, None, None), (x, x, x)):
        for guided in (48, 36):
            guided_step(x, x, *others, 48, guided, *coefficients())
    assert len(programs) == 5  # without guidance it does not matter which channels are guided
    for program in programs.values():
        assert re.search(r"\bst\.global", program.ptx)
        assert not re.search(r"\batom|\bred\.|div\.full", program.ptx)
