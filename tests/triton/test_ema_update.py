"""Triton EMA update: against the formula in float64, with an error bound carried along."""

import pytest
import torch

import vqkernels
from vqkernels.triton.ema_update import ema_update_

U = 2.0**-24


def problem(heads=2, codes=70, dim=5, empty=0.3):
    counts = torch.randint(0, 40, (heads, codes)) * (torch.rand(heads, codes) > empty)
    sums = torch.randn(heads, codes, dim) * counts.unsqueeze(-1)
    return torch.randn(heads, codes, dim), 10 * torch.rand(heads, codes), torch.randn(heads, codes, dim), counts, sums


def lerp(old, new, weight):
    """Value and error bound: weight, difference, product and sum are rounded."""
    return old + weight * (new - old), 4.01 * U * (weight * (old.abs() + new.abs()) + old.abs())


def assert_follows_formula(actual, before, decay, eps):
    codebook, size, code_sum, counts, sums = (t.double() for t in before)
    new_size, size_error = lerp(size, counts, 1 - decay)
    new_sum, sum_error = lerp(code_sum, sums, 1 - decay)
    n, n_error = new_size.sum(-1, keepdim=True), size_error.sum(-1, keepdim=True)
    codes_eps = codebook.shape[1] * eps
    smoothed = ((new_size + eps) / (n + codes_eps) * n).unsqueeze(-1)
    # Relative errors: the sizes', that of n twice, and eight roundings (n, both eps, sums, quotients, product).
    relative = size_error / (new_size + eps) + n_error / (n + codes_eps) + n_error / n + 8.01 * U
    new_codebook = new_sum / smoothed
    codebook_error = (sum_error + new_sum.abs() * relative.unsqueeze(-1)) / smoothed
    stays = smoothed.expand_as(codebook) == 0
    assert torch.equal(actual[0][stays], before[0][stays])
    assert ((actual[0] - new_codebook).abs() <= 1.01 * codebook_error)[~stays].all()
    assert ((actual[1] - new_size).abs() <= size_error).all()
    assert ((actual[2] - new_sum).abs() <= sum_error).all()


@pytest.mark.parametrize("dim", [1, 3, 8, 12, 65])
@pytest.mark.parametrize(("decay", "eps"), [(0.99, 1e-5), (0.8, 0.0), (0.0, 1e-5), (1.0, 1e-3)])
def test_formula(decay, eps, dim, device):
    for codes in (1, 7, 70):
        before = problem(codes=codes, dim=dim)
        after = [t.to(device, copy=True) for t in before]
        ema_update_(*after, decay, eps)
        assert_follows_formula([t.cpu() for t in after[:3]], before, decay, eps)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(after[3:], before[3:], strict=True))


def test_code_without_size_stays(device):
    before = problem(codes=9, empty=0.5)
    before[1][:, ::2] = 0
    before[3][:, ::2] = 0
    after = [t.to(device, copy=True) for t in before]
    ema_update_(*after, 0.9, 0.0)
    assert torch.equal(after[0][:, ::2].cpu(), before[0][:, ::2])
    assert_follows_formula([t.cpu() for t in after[:3]], before, 0.9, 0.0)


def test_views_and_version_counters(device):
    before = problem(heads=1, codes=20, dim=6)
    expected = [t.to(device, copy=True) for t in before]
    ema_update_(*expected, 0.9, 1e-5)
    assert [t._version > 0 for t in expected] == [True] * 3 + [False] * 2

    codebook, size, code_sum, counts, sums = (t.to(device)[0] for t in before)
    views = [codebook.T.contiguous().T, size.repeat_interleave(2)[::2], code_sum.T.contiguous().T]
    versions = [t._version for t in views]
    vqkernels.ema_update_(*views, counts, sums.T.contiguous().T, decay=0.9, eps=1e-5, backend="triton")
    assert all(torch.equal(a, b[0]) for a, b in zip(views, expected, strict=False))
    assert all(t._version > v for t, v in zip(views, versions, strict=True))


def test_many_codes(device):
    before = problem(heads=1, codes=600, dim=8)
    after = [t.to(device, copy=True) for t in before]
    ema_update_(*after, 0.9, 1e-5)
    assert_follows_formula([t.cpu() for t in after[:3]], before, 0.9, 1e-5)
