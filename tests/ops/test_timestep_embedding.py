"""Sinusoidal embeddings of timesteps: against the formula in float64 and against diffusers, bit for bit."""

import itertools
import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from vqkernels import timestep_embedding


@pytest.mark.parametrize("dim", [1, 2, 7, 64, 256, 257])
def test_formula(dim):
    t = torch.tensor([0.0, 0.25, 1.0, 17.0, 999.0], dtype=torch.float64)
    half = dim // 2
    for order, shift, scale, period in itertools.product(
        ("cos_sin", "sin_cos"), (0.0, 0.5, 1.0), (1.0, 1000.0), (1e4, 100)
    ):
        if shift >= half > 0:
            continue
        options = {"order": order, "shift": shift, "scale": scale, "max_period": period}
        expected = torch.zeros(5, dim, dtype=torch.float64)
        for row, i in itertools.product(range(5), range(half)):
            angle = scale * t[row].item() * period ** (-i / (half - shift))
            first, second = (math.cos(angle), math.sin(angle))[:: 1 if order == "cos_sin" else -1]
            expected[row, i], expected[row, half + i] = first, second
        # In float64 angles up to 1e6 are off by some roundings, in float32 by 2^29 times that.
        assert (timestep_embedding(t, dim, **options) - expected).abs().max() <= 2.0**-52 * 16 * scale * 999
        single = timestep_embedding(t.float(), dim, **options)
        assert single.dtype == torch.float32
        assert (single - expected).abs().max() <= 2.0**-23 * 16 * scale * 999


@pytest.mark.parametrize("dim", [2, 5, 128, 320])
def test_diffusers(dim):
    for t in (torch.arange(0, 1000, 37), torch.rand(7), torch.tensor([3], dtype=torch.int32)):
        for flip, shift, scale in itertools.product((False, True), (0, 0.5, 1), (1, 1000)):
            if shift < dim // 2:
                expected = get_timestep_embedding(t, dim, flip, shift, scale, 10000)
                order = "cos_sin" if flip else "sin_cos"
                assert torch.equal(timestep_embedding(t, dim, order=order, shift=shift, scale=scale), expected)


def test_dtypes_and_shapes():
    t = torch.tensor([[1, 2, 3], [4, 5, 6]])
    whole = timestep_embedding(t, 6)
    assert whole.shape == (2, 3, 6)
    assert torch.equal(whole[1, 2], timestep_embedding(t[1, 2], 6))
    assert timestep_embedding(t[:0], 6).shape == (0, 3, 6)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(timestep_embedding(t, 6, dtype=dtype), whole.to(dtype))
    assert timestep_embedding(t.double(), 6).dtype == torch.float64


def test_gradient_and_compile():
    t = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: timestep_embedding(t, 9, scale=3.0), t)
    compiled = torch.compile(timestep_embedding, fullgraph=True)
    steps = torch.arange(5)
    torch.testing.assert_close(
        compiled(steps, 16, order="sin_cos", shift=1), timestep_embedding(steps, 16, order="sin_cos", shift=1)
    )


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1, 2], 4), {}, TypeError, "t: expected a tensor of int64"),
        ((torch.zeros(2, dtype=torch.bool), 4), {}, TypeError, "t: expected a tensor of int64"),
        ((torch.zeros(2), 0), {}, ValueError, "dim: expected an integer of at least 1, got 0"),
        ((torch.zeros(2), 4), {"order": "sin"}, ValueError, "order: expected one of cos_sin, sin_cos"),
        ((torch.zeros(2), 4), {"max_period": 0}, ValueError, "max_period: expected a number above 0, got 0"),
        ((torch.zeros(2), 4), {"shift": 2}, ValueError, "shift: expected a number below 2, half of dim, got 2"),
        ((torch.zeros(2), 4), {"dtype": torch.int64}, TypeError, "dtype: expected None or one of float32"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        timestep_embedding(*arguments, **options)
