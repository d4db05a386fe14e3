"""Quantized rows, loss and statistics: against an independent emulation bit for bit, and what broken rows may do."""

import itertools

import numpy as np
import pytest
import torch
import vq_emulation
from hypothesis import given
from hypothesis import strategies as st
from vq_cases import CODES, DIMS, DTYPES, KINDS, LEVELS, METRICS, ROWS, cpu_level, make_inputs, same_bits

import vqkernels


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert (a is None and b is None) or same_bits(a.detach(), b.detach())


def emulated(z, codebook, metric="l2", mask=None):
    """quantized, indices and mse of rows [N, D] in any type but float64."""
    z32, codebook32 = z.float().numpy(), codebook.float().numpy()
    indices, _ = vq_emulation.nearest_code(z32, codebook32, metric)
    if mask is not None:
        indices = np.where(mask.numpy(), indices, -1)
    quantized, mse = vq_emulation.vector_quantize(z32, codebook32, indices)
    quantized = torch.from_numpy(quantized)
    if mask is not None:
        quantized[~mask] = 0
    return quantized.to(z.dtype), torch.from_numpy(indices), torch.tensor(mse)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", DIMS)
def test_levels_equal_emulation(kind, dim):
    for i, codes in enumerate(CODES):
        rows = ROWS[(5 * i + DIMS.index(dim)) % len(ROWS)]
        rows = min(rows, 1 + 150_000 // (codes * dim))
        z, codebook = make_inputs(kind, rows, codes, dim, seed=i)
        mask = None if i % 2 else torch.rand(rows) > 0.3
        metric = METRICS[i % 3]
        expected = emulated(z, codebook, metric, mask)
        counts, sums = vq_emulation.code_statistics(z.numpy(), expected[1].numpy(), codes)
        for level, threads in itertools.product(LEVELS, (1, 2, 3)):
            torch.set_num_threads(threads)
            with cpu_level(level):
                result = vqkernels.vector_quantize(z, codebook, metric=metric, mask=mask, statistics=True)
            assert_same(result, (*expected, torch.from_numpy(counts), torch.from_numpy(sums)))


@pytest.mark.parametrize("z_dtype", DTYPES)
@pytest.mark.parametrize("codebook_dtype", DTYPES)
def test_dtypes(z_dtype, codebook_dtype):
    wide = torch.float64 in (z_dtype, codebook_dtype)
    for rows, codes, dim in [(3, 65, 12), (70, 13, 17), (33, 7, 3), (9, 130, 8)]:
        z, codebook = (
            x.to(t) for x, t in zip(make_inputs("normal", rows, codes, dim), (z_dtype, codebook_dtype), strict=True)
        )
        z[1, 0] = torch.nan
        results = []
        for level in LEVELS:
            with cpu_level(level):
                results.append(vqkernels.vector_quantize(z, codebook, statistics=True))
        for result in results:
            assert_same(result, results[0])
        quantized, indices, loss, counts, sums = results[0]
        assert (quantized.dtype, loss.dtype, sums.dtype) == (
            z_dtype,
            torch.float64 if wide else torch.float32,
            torch.float32,
        )
        if not wide:
            assert_same(results[0][:3], emulated(z, codebook))
        chosen = indices >= 0
        assert torch.equal(indices, vqkernels.nearest_code(z, codebook))
        assert torch.equal(quantized[chosen], codebook[indices[chosen]].to(z_dtype))
        assert quantized[~chosen].isnan().all()
        exact = (z.double()[chosen] - codebook.double()[indices[chosen]]).square().mean()
        unit = 2.0**-53 if wide else 2.0**-24
        assert abs(loss.double() - exact) <= (dim + 8) * unit * exact
        assert_same((counts, sums), vqkernels.code_statistics(z, indices, codes))


@given(
    rows=st.integers(0, 200),
    codes=st.integers(1, 70),
    dim=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    metric=st.sampled_from(METRICS),
    level=st.sampled_from(LEVELS),
    threads=st.integers(1, 3),
)
def test_any_shape(rows, codes, dim, kind, metric, level, threads):
    z, codebook = make_inputs(kind, rows, codes, dim, seed=codes)
    torch.set_num_threads(threads)
    with cpu_level(level):
        result = vqkernels.vector_quantize(z, codebook, metric=metric)
        assert_same(vqkernels.vector_quantize(z, codebook, metric=metric), result)
    assert_same(result[:3], emulated(z, codebook, metric))


def test_heads_strides_and_weights():
    z, codebook = torch.randn(3, 4, 25, 24)[..., ::2], torch.randn(3, 12, 30).mT
    mask = torch.rand(4, 25) > 0.3
    result = vqkernels.vector_quantize(
        z, codebook, mask=mask, commitment_weight=0.25, codebook_weight=2.0, statistics=True
    )
    errors = 0.0
    for h in range(3):
        flat = z[h].flatten(0, 1)
        quantized, indices, _ = emulated(flat, codebook[h], mask=mask.flatten())
        assert same_bits(result.quantized[h].flatten(0, 1), quantized)
        assert torch.equal(result.indices[h].flatten(), indices)
        assert_same((result.counts[h], result.sums[h]), vqkernels.code_statistics(flat, indices, 30))
        errors += (quantized - flat).double()[mask.flatten()].square().sum()
    exact = 2.25 * errors / (3 * 12 * mask.sum())
    assert abs(result.loss - exact) < 24 * 2.0**-24 * exact


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e20])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
def test_one_broken_row(level, bad, gradient):
    """Everything but the row's own output is what it is without the row, bit for bit."""
    z, codebook = torch.randn(300, 12), torch.randn(20, 12)
    broken = z.clone()
    broken[100, 3] = bad
    rest = torch.arange(300) != 100
    g = torch.randn(300, 12)
    outcomes = []
    for rows, grad in ((broken, g), (z[rest], g[rest])):
        rows, codes = rows.clone().requires_grad_(), codebook.clone().requires_grad_()
        with cpu_level(level):
            result = vqkernels.vector_quantize(rows, codes, gradient=gradient, codebook_weight=0.5, statistics=True)
            torch.autograd.backward([result.quantized, result.loss], [grad, torch.tensor(1.5)])
        outcomes.append((result, rows.grad, codes.grad))
    (result, grad_z, grad_codes), (without, grad_z_without, grad_codes_without) = outcomes
    assert result.indices[100] == -1
    assert result.quantized[100].isnan().all()
    assert torch.equal(grad_z[100], torch.zeros(12))
    assert_same((result.quantized[rest], result.indices[rest]), without[:2])
    assert_same(result[3:], without[3:])
    assert same_bits(grad_z[rest], grad_z_without)
    assert same_bits(grad_codes, grad_codes_without)
    # The rows' errors meet in lanes by row number, so that the sum of 299 may differ from that of 300 in rounding.
    assert abs(result.loss - without.loss) <= 4 * 2.0**-24 * without.loss


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_code_to_choose(level, dtype):
    z, codebook = (
        torch.randn(20, 6).to(dtype).requires_grad_(),
        torch.full((5, 6), torch.nan, dtype=dtype, requires_grad=True),
    )
    mask = torch.arange(20) % 2 == 0
    with cpu_level(level):
        result = vqkernels.vector_quantize(z, codebook, mask=mask, codebook_weight=1.0, statistics=True)
        assert torch.equal(result.indices, torch.full((20,), -1))
        assert result.loss == 0
        assert result.counts.sum() == 0
        assert torch.equal(result.sums, torch.zeros(5, 6))
        assert result.quantized[mask].isnan().all()
        assert torch.equal(result.quantized[~mask], torch.zeros(10, 6, dtype=dtype))
        result.loss.backward()
    assert torch.equal(z.grad, torch.zeros(20, 6, dtype=dtype))
    assert torch.equal(codebook.grad, torch.zeros(5, 6, dtype=dtype))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("gradient", ["straight_through", "none"])
def test_a_broken_code_has_no_gradient(bad, gradient):
    """It is never chosen, so nothing depends on it; the others' gradients do not see it either."""
    z, codebook = torch.randn(20, 6), torch.randn(5, 6)
    codebook[2, 3] = bad
    kept = torch.arange(5) != 2
    grads = []
    for codes in (codebook.clone().requires_grad_(), codebook[kept].clone().requires_grad_()):
        result = vqkernels.vector_quantize(z, codes, gradient=gradient, codebook_weight=1.0)
        (result.loss + result.quantized.square().sum()).backward()
        grads.append(codes.grad)
    assert torch.equal(grads[0][2], torch.zeros(6))
    assert same_bits(grads[0][kept], grads[1])


@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
def test_no_rows(gradient):
    for level in LEVELS:
        z, codebook = torch.empty(2, 0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        with cpu_level(level):
            result = vqkernels.vector_quantize(z, codebook, gradient=gradient, codebook_weight=1.0, statistics=True)
            (result.quantized.sum() + result.loss).backward()
        assert result.quantized.shape == (2, 0, 4)
        assert result.loss == 0
        assert z.grad.shape == z.shape
        assert torch.equal(codebook.grad, torch.zeros(5, 4))


def test_results_without_statistics():
    result = vqkernels.vector_quantize(torch.randn(7, 4), torch.randn(5, 4))
    assert result.counts is None
    assert result.sums is None
    assert result.loss.shape == ()
