"""Tables of rotary embeddings: against diffusers, the definition in numpy, and bad input."""

import math

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

import vqkernels


@pytest.mark.parametrize(
    ("sizes", "dim", "axes_dims"),
    [
        ((7,), 2, None),
        ((300,), 72, None),
        ((3, 5), 72, None),
        ((2, 3, 5), 128, None),
        ((2, 3, 4, 1), 20, (2, 10, 0, 8)),
    ],
)
def test_definition(sizes, dim, axes_dims):
    cos, sin = vqkernels.rope_tables(sizes, dim, theta=500.0, axes_dims=axes_dims)
    if axes_dims is None:
        part = dim // (2 * len(sizes)) * 2
        axes_dims = [dim - part * (len(sizes) - 1)] + [part] * (len(sizes) - 1)
    positions = np.stack(np.unravel_index(np.arange(math.prod(sizes)), sizes), 1)
    angles = np.concatenate(
        [
            positions[:, axis, None]
            * np.power(np.longdouble(500), -np.arange(0, dims, 2, np.longdouble) / max(dims, 1))
            for axis, dims in enumerate(axes_dims)
        ],
        1,
    )
    assert cos.dtype == sin.dtype == torch.float32
    for actual, expected in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        assert actual.shape == (math.prod(sizes), dim // 2)
        # One rounding to float32, and what an angle of float64 may be off by.
        allowed = 2.0**-24 * abs(expected) + 4 * 2.0**-53 * (1 + angles)
        assert (abs(actual.double().numpy() - expected) <= allowed).all()


def test_positions_of_one_axis_as_diffusers():
    cos, sin = get_1d_rotary_pos_embed(64, 50, use_real=True, freqs_dtype=torch.float64)
    actual = vqkernels.rope_tables((50,), 64)
    torch.testing.assert_close(actual[0], cos[:, ::2], rtol=0, atol=2.0**-24)
    torch.testing.assert_close(actual[1], sin[:, ::2], rtol=0, atol=2.0**-24)


def test_grid_of_flux():
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(6.0), torch.arange(5.0))
    cos, sin = FluxPosEmbed(10000, [16, 56, 56])(ids)
    actual = vqkernels.rope_tables((1, 6, 5), 128, axes_dims=(16, 56, 56))
    torch.testing.assert_close(actual[0], cos[:, ::2], rtol=0, atol=2.0**-24)
    torch.testing.assert_close(actual[1], sin[:, ::2], rtol=0, atol=2.0**-24)


def test_split_of_wan():
    cos, sin = WanRotaryPosEmbed(128, (1, 1, 1), 32)(torch.zeros(1, 4, 3, 2, 5))
    actual = vqkernels.rope_tables((3, 2, 5), 128)
    torch.testing.assert_close(actual[0], cos.flatten(0, 2)[:, ::2].float(), rtol=0, atol=2.0**-23)
    torch.testing.assert_close(actual[1], sin.flatten(0, 2)[:, ::2].float(), rtol=0, atol=2.0**-23)


def test_no_positions():
    assert vqkernels.rope_tables((0, 4), 8)[0].shape == (0, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sizes": 5}, TypeError, "sizes: expected a sequence of integers, one an axis, got int 5"),
        ({"sizes": ()}, TypeError, "sizes: expected a sequence"),
        ({"sizes": (3, -1)}, ValueError, r"sizes\[1\]: expected an integer of at least 0, got -1"),
        ({"dim": 7}, ValueError, "dim: expected an even number of at least 4, two an axis, got 7"),
        ({"dim": 2}, ValueError, "dim: expected an even number of at least 4"),
        ({"dim": 0}, ValueError, "dim: expected an integer of at least 1, got 0"),
        ({"theta": 0.0}, ValueError, "theta: expected a number above 0, got 0.0"),
        ({"theta": "x"}, TypeError, "theta: expected a number"),
        ({"axes_dims": (8,)}, ValueError, r"axes_dims: expected 2 even numbers, one an axis, got \[8\]"),
        ({"axes_dims": (3, 5)}, ValueError, "axes_dims: expected 2 even numbers"),
        ({"axes_dims": (2, 4)}, ValueError, r"axes_dims: expected a sum of 8 to match dim, got \[2, 4\]"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        vqkernels.rope_tables(**({"sizes": (3, 4), "dim": 8} | options))
