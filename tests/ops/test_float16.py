"""bfloat16 and half: widening and narrowing of every bit pattern, seen through the operations."""

import pytest
import torch
from vq_cases import LEVELS, cpu_level, same_bits

import vqkernels

HALVES = (torch.bfloat16, torch.float16)


def every_value(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_row_is_widened(level, dtype):
    """The dot product with 1 is the value itself; in one large batch, and in batches of one row (heads)."""
    values = every_value(dtype)
    wide = values.float()
    valid = wide.square() <= torch.finfo(torch.float32).max / 4
    with cpu_level(level):
        for z, codes in ((values.unsqueeze(1), torch.ones(1, 1)), (values.reshape(-1, 1, 1), torch.ones(65536, 1, 1))):
            indices, scores = vqkernels.nearest_code(z, codes, metric="dot", return_score=True)
            assert torch.equal(indices.flatten() >= 0, valid)
            assert torch.equal(scores.flatten()[valid], wide[valid])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_code_is_widened(level, dtype):
    """Heads of one code each, so that every pattern is met as a code."""
    values = every_value(dtype).reshape(-1, 1, 1)
    wide = values.float().flatten()
    valid = wide.square() <= torch.finfo(torch.float32).max / 4
    with cpu_level(level):
        for rows in (1, 17):
            z = torch.ones(len(values), rows, 1)
            indices, scores = vqkernels.nearest_code(z, values, metric="dot", return_score=True)
            assert torch.equal(indices, torch.where(valid, 0, -1).unsqueeze(1).expand(-1, rows))
            assert torch.equal(scores[valid], wide[valid].unsqueeze(1).expand(-1, rows))
            quantized = vqkernels.vector_quantize(z, values).quantized
            assert torch.equal(quantized[valid], wide[valid].reshape(-1, 1, 1).expand(-1, rows, 1))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", HALVES)
def test_statistics_widen(level, dtype):
    values = every_value(dtype)
    values = values[~values.isnan()]
    with cpu_level(level):
        _, sums = vqkernels.code_statistics(values.unsqueeze(1), torch.arange(len(values)), len(values))
    assert torch.equal(sums[:, 0], values.float())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", HALVES)
def test_narrowing(level, dtype):
    """float32 codes around every value of the narrow type: exact, halfway between two, and one ulp to either side."""
    values = every_value(dtype).float()
    values = values[values.isfinite()].sort().values
    halfway = values[:-1] + (values[1:] - values[:-1]) / 2
    centres = torch.cat([values, halfway])
    up, down = torch.nextafter(centres, torch.tensor(torch.inf)), torch.nextafter(centres, torch.tensor(-torch.inf))
    codes = torch.cat(
        [centres, up, down, torch.tensor([65504.0, 65519.99, 65520.0, 65536.0, 1e18, -1e18, 1e-40, -1e-45])]
    )
    codes = codes[codes.square() <= torch.finfo(torch.float32).max / 4]
    with cpu_level(level):
        result = vqkernels.vector_quantize(torch.ones(len(codes), 1, 1, dtype=dtype), codes.reshape(-1, 1, 1))
    assert torch.all(result.indices == 0)
    assert same_bits(result.quantized.flatten(), codes.to(dtype))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", HALVES)
def test_straight_through_returns_every_gradient(level, dtype):
    g = every_value(dtype).unsqueeze(1)
    z = torch.ones(len(g), 1, dtype=dtype, requires_grad=True)
    with cpu_level(level):
        vqkernels.vector_quantize(z, torch.ones(1, 1, dtype=dtype)).quantized.backward(g)
    assert torch.equal(z.grad.isnan(), g.isnan())
    assert torch.equal(z.grad[~g.isnan()], g[~g.isnan()])
