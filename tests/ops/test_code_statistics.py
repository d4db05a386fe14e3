"""Counts and sums against exact rationals, float64 and the run-of-256 contract, on every instruction set."""

import itertools
from fractions import Fraction

import pytest
import torch
import vq_emulation
from hypothesis import given
from hypothesis import strategies as st
from vq_cases import DIMS, DTYPES, LEVELS, cpu_level, same_bits

import vqkernels


def assert_same(actual, expected):
    assert torch.equal(actual[0], expected[0])
    assert same_bits(actual[1], expected[1])


def emulated(z, indices, num_codes):
    wide = z.double() if z.dtype == torch.float64 else z.float()
    counts, sums = vq_emulation.code_statistics(wide.numpy(), indices.numpy(), num_codes)
    return torch.from_numpy(counts), torch.from_numpy(sums).float()


def indices_of(rows, num_codes, kind):
    if kind == "skewed":  # hundreds of rows in one code: several runs
        indices = torch.where(torch.rand(rows) < 0.8, 0, torch.randint(0, num_codes, (rows,)))
    elif kind == "one":
        indices = torch.full((rows,), num_codes - 1)
    else:
        indices = torch.randint(-1, num_codes, (rows,))
    return indices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_levels_equal_emulation(dtype, dim):
    for rows, num_codes, kind in [
        (0, 3, "any"),
        (1, 1, "one"),
        (255, 1, "one"),
        (256, 2, "one"),
        (257, 1, "one"),
        (700, 7, "skewed"),
        (1300, 64, "skewed"),
        (333, 300, "any"),
    ]:
        z, indices = torch.randn(rows, dim).to(dtype), indices_of(rows, num_codes, kind)
        expected = emulated(z, indices, num_codes)
        for level, threads in itertools.product(LEVELS, (1, 3)):
            torch.set_num_threads(threads)
            with cpu_level(level):
                assert_same(vqkernels.code_statistics(z, indices, num_codes), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_exact_rationals(level):
    """Sums of integers are exact; of others they are within the bound of recursive summation."""
    rows, num_codes, dim = 900, 3, 5
    indices = indices_of(rows, num_codes, "skewed")
    whole = torch.randint(-1000, 1000, (rows, dim)).float()
    for z in (whole, torch.randn(rows, dim)):
        exact = [[Fraction(0)] * dim for _ in range(num_codes)]
        absolute = [[Fraction(0)] * dim for _ in range(num_codes)]
        for k, row in zip(indices.tolist(), z.tolist(), strict=True):
            exact[k] = [total + Fraction(v) for total, v in zip(exact[k], row, strict=True)]
            absolute[k] = [total + abs(Fraction(v)) for total, v in zip(absolute[k], row, strict=True)]
        with cpu_level(level):
            counts, sums = vqkernels.code_statistics(z, indices, num_codes)
        assert counts.tolist() == [indices.tolist().count(k) for k in range(num_codes)]
        bound = 0 if z is whole else Fraction(257, 2**24)
        for k, d in itertools.product(range(num_codes), range(dim)):
            assert abs(Fraction(sums[k, d].item()) - exact[k][d]) <= bound * absolute[k][d]


@pytest.mark.parametrize("level", LEVELS)
def test_float64_rows_are_summed_in_float64(level):
    z = torch.cat([torch.tensor([2.0**60]), torch.full((600,), 1.0), torch.tensor([-(2.0**60)])]).double().unsqueeze(1)
    z[1:601] = 2.0**8
    indices = torch.zeros(602, dtype=torch.int64)
    with cpu_level(level):
        assert vqkernels.code_statistics(z, indices, 1)[1].item() == 600 * 2.0**8


@given(
    rows=st.integers(0, 600),
    num_codes=st.integers(1, 40),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
    level=st.sampled_from(LEVELS),
    kind=st.sampled_from(["any", "one", "skewed"]),
)
def test_any_shape(rows, num_codes, dim, dtype, threads, level, kind):
    z, indices = torch.randn(rows, dim).to(dtype), indices_of(rows, num_codes, kind)
    torch.set_num_threads(threads)
    with cpu_level(level):
        actual = vqkernels.code_statistics(z, indices, num_codes)
        assert_same(vqkernels.code_statistics(z, indices, num_codes), actual)
    assert_same(actual, emulated(z, indices, num_codes))


@pytest.mark.parametrize("level", LEVELS)
def test_heads_and_batch_shapes(level):
    z, indices = torch.randn(3, 4, 50, 12), torch.randint(-1, 9, (3, 4, 50))
    with cpu_level(level):
        counts, sums = vqkernels.code_statistics(z, indices, 9, heads=True)
        together = vqkernels.code_statistics(z, indices, 9)
        none = vqkernels.code_statistics(z[:, :, :0], indices[:, :, :0], 9, heads=True)
    for h in range(3):
        assert_same((counts[h], sums[h]), emulated(z[h].flatten(0, 1), indices[h].flatten(), 9))
    assert_same(together, emulated(z.flatten(0, 2), indices.flatten(), 9))
    assert_same(none, (torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, 12)))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(level, dtype):
    z, indices = torch.randn(40, 12).to(dtype), torch.randint(-1, 5, (40,))
    expected = emulated(z, indices, 5)
    padded = torch.full((80, 30), torch.nan, dtype=dtype)
    padded[::2, 1:25:2] = z
    spread = torch.full((40, 3), -9)
    spread[:, 1] = indices
    with cpu_level(level):
        assert_same(vqkernels.code_statistics(padded[::2, 1:25:2], spread[:, 1], 5), expected)
        assert_same(vqkernels.code_statistics(z.t().contiguous().t(), indices, 5), expected)
        row = vqkernels.code_statistics(z[:1].expand(300, 12), torch.full((300,), 2), 3)
    assert_same(row, emulated(z[:1].repeat(300, 1), torch.full((300,), 2), 3))


@pytest.mark.parametrize("level", LEVELS)
def test_rows_without_a_code_count_nowhere(level):
    z, indices = torch.randn(500, 17), torch.randint(0, 6, (500,))
    left_out = torch.rand(500) < 0.3
    broken = z.masked_fill(left_out.unsqueeze(1), torch.nan)
    with cpu_level(level):
        actual = vqkernels.code_statistics(broken, indices.masked_fill(left_out, -1), 6)
        assert_same(actual, vqkernels.code_statistics(z[~left_out], indices[~left_out], 6))
    assert actual[0].sum() == (~left_out).sum()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [-2, 6, 2**40, -(2**63)])
@pytest.mark.parametrize("position", [0, 99])
def test_index_out_of_range(level, bad, position):
    z, indices = torch.randn(100, 4), torch.randint(-1, 6, (100,))
    indices[position] = bad
    with cpu_level(level), pytest.raises(IndexError, match=rf"indices: expected values from -1 to 5, got {bad}"):
        vqkernels.code_statistics(z, indices, 6)
