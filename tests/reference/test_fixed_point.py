"""Fixed-point sums against fractions, hashes against splitmix64, and the choice of rows by them."""

from fractions import Fraction

import pytest
import torch

from vqkernels.reference import _fixed_point
from vqkernels.reference._contributions import join_counts, split_counts


def fixed_point(rows, indices, num_codes):
    largest = _fixed_point.largest_value(rows, indices)
    sums = _fixed_point.fixed_point_sums(rows, indices, num_codes, largest)
    return largest, sums, _fixed_point.from_fixed_point(sums, largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 3e3])
def test_sums_are_exact_up_to_the_unit(dtype, scale):
    rows = (torch.randn(2, 40, 3) * scale).to(dtype)
    indices = torch.randint(-1, 5, (2, 40))
    rows[:, 3] = torch.nan
    indices[:, 3] = -1
    _, _, sums = fixed_point(rows, indices, 5)
    for c in range(2):
        taken = rows[c][indices[c] >= 0]
        largest = Fraction(taken.abs().max().item())
        # The largest value has 31 bits: the unit is at most its 2^-30th part, and rounding half of that.
        for k in range(5):
            members = rows[c][indices[c] == k]
            for d in range(3):
                truth = sum((Fraction(value) for value in members[:, d].tolist()), Fraction(0))
                error = len(members) * largest / 2**31 + abs(truth) * Fraction(torch.finfo(torch.float32).eps)
                assert abs(Fraction(sums[c, k, d].item()) - truth) <= error


@pytest.mark.parametrize("value", [3.0, 1.0, 2.0**-140, 3e38, -1.5, 0.0])
def test_one_value_comes_back(value):
    rows = torch.full((1, 1, 2), value)
    assert torch.equal(fixed_point(rows, torch.zeros(1, 1, dtype=torch.int64), 1)[2], rows)


def test_sums_do_not_depend_on_the_order():
    rows = torch.randn(1, 200, 4) * torch.logspace(-6, 6, 200).view(1, -1, 1)
    indices = torch.randint(0, 3, (1, 200))
    order = torch.randperm(200)
    assert torch.equal(fixed_point(rows, indices, 3)[2], fixed_point(rows[:, order], indices[:, order], 3)[2])


def test_sums_do_not_overflow():
    """2^31 rows of the largest value have room."""
    largest = _fixed_point.largest_value(torch.full((1, 1, 1), 1.999), torch.zeros(1, 1, dtype=torch.int64))
    one = _fixed_point.fixed_point_sums(torch.full((1, 1, 1), 1.999), torch.zeros(1, 1, dtype=torch.int64), 1, largest)
    assert 2**30 <= one.item() < 2**31


def test_the_largest_value_of_no_rows_is_zero():
    none = torch.empty(2, 0, dtype=torch.int64)
    assert _fixed_point.largest_value(torch.empty(2, 0, 3), none).tolist() == [0, 0]
    assert torch.equal(fixed_point(torch.empty(2, 0, 3), none, 4)[2], torch.zeros(2, 4, 3))
    bits = _fixed_point.largest_value(torch.tensor([[[1.0, -7.5]]]), torch.zeros(1, 1, dtype=torch.int64))
    assert bits.view(torch.float64).tolist() == [7.5]


def test_mix_is_splitmix64():
    states = torch.arange(1, 4) * _fixed_point.INCREMENT
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # the first numbers from seed 0
    assert [value % 2**64 for value in _fixed_point._mix(states).tolist()] == expected


def test_hashes_follow_from_the_bits():
    rows = torch.randn(2, 500, 3)
    seed = torch.rand(2, 7)
    hashes = _fixed_point.hash_rows(rows, seed)
    assert ((hashes >= 0) & (hashes < 2**62)).all()
    order = torch.randperm(500)
    assert torch.equal(_fixed_point.hash_rows(rows[:, order], seed), hashes[:, order])
    assert len(hashes.unique()) == hashes.numel()
    nearby = rows.clone()
    nearby[..., 0] = torch.nextafter(nearby[..., 0], torch.tensor(9.0))
    other = [
        _fixed_point.hash_rows(nearby, seed),
        _fixed_point.hash_rows(rows.flip(-1), seed),
        _fixed_point.hash_rows(rows, seed + 1e-3),
    ]
    for changed in other:
        assert (changed != hashes).all()
        # Half of the 62 bits change, within 6 standard deviations.
        bits = sum(((changed ^ hashes) >> i & 1).double().mean().item() for i in range(62))
        assert abs(bits - 31) < 6 * (62 / 4 / hashes.numel()) ** 0.5


def test_random_order_is_a_permutation_that_follows_from_the_seed():
    seed = torch.rand(3, 50)
    order = _fixed_point.random_order(seed)
    assert torch.equal(order.sort(-1).values, torch.arange(50.0).expand(3, 50))
    assert torch.equal(order, _fixed_point.random_order(seed))
    assert len(order.unique(dim=0)) == 3
    firsts = _fixed_point.random_order(torch.rand(4000, 4)).argmax(-1)
    share = torch.bincount(firsts, minlength=4).double() / 4000
    assert ((share - 0.25).abs() < 6 * (0.25 * 0.75 / 4000) ** 0.5).all()


def test_split_counts_add_up():
    counts = torch.tensor([0, 1, 4095, 4096, 2**24 + 1, 2**35 + 4095])
    parts = [part * 2 for part in split_counts(counts)]
    assert all(part.dtype == torch.float32 for part in parts)
    assert torch.equal(join_counts(*parts), 2 * counts)
