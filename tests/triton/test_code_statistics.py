"""Triton statistics: to the bit those of an independent emulation and of the native kernels."""

import pytest
import torch
import vq_emulation
from hypothesis import given, settings
from hypothesis import strategies as st
from vq_cases import DTYPES, same_bits

import vqkernels
from vqkernels.triton.code_statistics import code_statistics


def statistics(z, indices, num_codes, device):
    return [t.cpu() for t in code_statistics(z.to(device), indices.to(device), num_codes)]


def emulated(z, indices, num_codes):
    """One head."""
    rows = z if z.dtype == torch.float64 else z.float()
    return [torch.from_numpy(t) for t in vq_emulation.code_statistics(rows.numpy(), indices.numpy(), num_codes)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 8, 12, 65])
def test_equals_emulation_and_native(dim, dtype, device):
    for num_codes in (1, 7, 70):
        z = torch.randn(1, 300, dim).to(dtype)
        indices = torch.randint(-1, num_codes, (1, 300))
        counts, sums = statistics(z, indices, num_codes, device)
        assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for expected in (
            emulated(z[0], indices[0], num_codes),
            torch.ops.vqkernels.code_statistics(z, indices, num_codes),
        ):
            assert same_bits(counts, expected[0].reshape(1, -1))
            assert same_bits(sums, expected[1].reshape(1, num_codes, dim))


@settings(max_examples=8)
@given(data=st.data())
def test_skewed_runs(device, data):
    """Codes of none to several runs, around the ends of runs."""
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 255, 256, 257, 511, 512, 513]), min_size=1, max_size=4))
    dim = data.draw(st.integers(1, 9))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    indices = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    indices = indices[torch.randperm(len(indices), generator=g)]
    z = torch.randn(len(indices), dim, generator=g) * 10 ** torch.randn(len(indices), 1, generator=g)
    counts, sums = statistics(z[None], indices[None], len(lengths), device)
    assert counts[0].tolist() == lengths
    assert same_bits(sums[0], emulated(z, indices, len(lengths))[1])


def test_one_code_of_many_runs(device):
    """Added up in float32, the runs would give other bits in some of these columns."""
    z, indices = torch.randn(1, 1500, 20), torch.zeros(1, 1500, dtype=torch.int64)
    counts, sums = statistics(z, indices, 2, device)
    assert counts.tolist() == [[1500, 0]]
    assert same_bits(sums[0], emulated(z[0], indices[0], 2)[1])


def test_heads_views_and_broken_rows(device):
    z = torch.randn(5, 40, 3).permute(2, 1, 0)
    z[1, 4] = torch.nan
    indices = torch.randint(-1, 6, (40, 3)).T
    indices[1, 4] = -1
    counts, sums = statistics(z, indices, 6, device)
    for h in range(3):
        expected = emulated(z[h], indices[h], 6)
        assert same_bits(counts[h], expected[0])
        assert same_bits(sums[h], expected[1])


def test_indices_out_of_range_are_ignored(device):
    z = torch.randn(2, 50, 4)
    indices = torch.randint(0, 5, (2, 50))
    outside = torch.rand(2, 50) < 0.5
    expected = statistics(z, indices.masked_fill(outside, -1), 5, device)
    wild = torch.tensor([5, 6, 2**62, -2, -(2**62)])[torch.randint(0, 5, (2, 50))]
    for a, b in zip(statistics(z, torch.where(outside, wild, indices), 5, device), expected, strict=True):
        assert same_bits(a, b)


def test_no_rows(device):
    counts, sums = statistics(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.int64), 4, device)
    assert same_bits(counts, torch.zeros(2, 4, dtype=torch.int64))
    assert same_bits(sums, torch.zeros(2, 4, 3))


def test_public_function(device):
    z, indices = torch.randn(2, 5, 7, 3, dtype=torch.float64), torch.randint(-1, 4, (2, 5, 7))
    actual = vqkernels.code_statistics(z.to(device), indices.to(device), 4, heads=True, backend="triton")
    for a, b in zip(actual, vqkernels.code_statistics(z, indices, 4, heads=True), strict=True):
        assert same_bits(a.cpu(), b)
