"""Triton residual quantization: every code within the bound of the search, and what follows from the codes exactly."""

import pytest
import torch
import vq_emulation
from hypothesis import given, settings
from hypothesis import strategies as st
from vq_bound import UNIT_ROUNDOFF, assert_within_bound, wide
from vq_cases import DTYPES, METRICS, make_inputs, same_bits

import vqkernels
from vqkernels.triton.residual_quantize import residual_quantize, residual_quantize_backward, residual_statistics
from vqkernels.triton.topk_codes import topk_codes
from vqkernels.triton.vector_quantize import vector_quantize, vector_quantize_backward

GRADIENTS = ("straight_through", "rotation", "none")
SIZES = (40, 1, 33)


def on(device, *values):
    return [v.to(device) if isinstance(v, torch.Tensor) else v for v in values]


def quantize(z, codebooks, sizes=SIZES, metric="l2", mask=None, num_levels=None, indices=None, device="cpu"):
    """On any device -> on CPU; leaves no input changed."""
    arguments = on(device, z, codebooks, list(sizes), metric, mask, num_levels, indices)
    tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    result = residual_quantize(*arguments)
    assert all(same_bits(a, b) for a, b in zip(tensors, before, strict=True))
    return [t.cpu() for t in result]


def residuals(z, codebooks, sizes, indices):
    """The residuals [H, N, D] of every level: one rounded subtraction an element, which IEEE defines."""
    dtype = wide(z.dtype, codebooks.dtype)
    residual = z.to(dtype)
    for codes, index in zip(codebooks.to(dtype).split(list(sizes), 1), indices.unbind(-1), strict=True):
        yield residual, codes, index
        chosen = torch.stack([c[i.clamp(min=0)] for c, i in zip(codes, index, strict=True)])
        residual = torch.where((index >= 0).unsqueeze(-1), residual - chosen, residual)


def assert_right(result, z, codebooks, sizes=SIZES, metric="l2", mask=None, num_levels=None):
    quantized, indices, mse, valid_rows = result
    heads, rows, dim = z.shape
    dtype = wide(z.dtype, codebooks.dtype)
    assert (quantized.shape, quantized.dtype) == (z.shape, z.dtype)
    assert (indices.shape, indices.dtype) == ((heads, rows, len(sizes)), torch.int64)
    assert (mse.shape, mse.dtype) == ((heads, len(sizes)), dtype)
    assert valid_rows.dtype == torch.int64
    runs = torch.ones(heads, rows, dtype=torch.bool) if mask is None else mask.clone()
    lacks_code = torch.zeros_like(runs)
    total = torch.zeros(z.shape, dtype=dtype)
    for level, (residual, codes, index) in enumerate(residuals(z, codebooks, sizes, indices)):
        if num_levels is not None:
            runs &= level < num_levels
        assert (index[~runs] == -1).all()
        has_code = index >= 0
        for head in range(heads):
            row = runs[head]
            assert_within_bound(residual[head, row], codes[head], metric, index[head, row], None)
            chosen = has_code[head]
            code = codes[head, index[head, chosen]]
            total[head, chosen] = code if level == 0 else total[head, chosen] + code
            assert valid_rows[head, level] == chosen.sum()
            error = (residual[head, chosen].double() - code.double()).square().sum() / max(chosen.sum() * dim, 1)
            # A difference counts twice, the square once, then the additions of a row and the quotient.
            if torch.isfinite(error.to(dtype)):
                assert (mse[head, level] - error).abs() <= (dim + 6) * UNIT_ROUNDOFF[dtype] * error
        lacks_code |= runs & ~has_code
        runs &= has_code
    total[lacks_code] = torch.nan
    assert same_bits(quantized, total.to(z.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 8, 12, 65, 130])
def test_levels(dim, dtype, device):
    z, codebooks = torch.randn(2, 67 if dim < 60 else 5, dim).to(dtype), torch.randn(2, 74, dim).to(dtype)
    metric = METRICS[dim % 3]
    assert_right(quantize(z, codebooks, metric=metric, device=device), z, codebooks, metric=metric)


@pytest.mark.parametrize("kind", ["integers", "duplicates", "one_ulp", "zeros", "large", "broken"])
@pytest.mark.parametrize("dim", [3, 129])
def test_hard_inputs(dim, kind, device):
    z, codebooks = (x.unsqueeze(0) for x in make_inputs(kind, 30, 20, dim))
    for metric in METRICS:
        result = quantize(z, codebooks, (5, 8, 7), metric, device=device)
        assert_right(result, z, codebooks, (5, 8, 7), metric)


@pytest.mark.parametrize("codebook_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype, codebook_dtype, device):
    z, codebooks = torch.randn(1, 20, 6).to(dtype), torch.randn(1, 12, 6).to(codebook_dtype)
    assert_right(quantize(z, codebooks, (5, 7), device=device), z, codebooks, (5, 7))


@settings(max_examples=10)
@given(data=st.data())
def test_drawn_shapes(device, data):
    """Heads, sizes, masks and dropped levels of any kind; views."""
    heads, rows, dim = (data.draw(st.integers(*bounds)) for bounds in ((1, 3), (0, 70), (1, 20)))
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    z = torch.randn(dim, rows, heads, generator=g).permute(2, 1, 0)
    codebooks = torch.randn(heads, dim, sum(sizes), generator=g).mT
    mask = (torch.rand(rows, heads, generator=g) < 0.7).T if data.draw(st.booleans()) else None
    num_levels = torch.randint(-1, len(sizes) + 2, (rows, heads), generator=g).T if data.draw(st.booleans()) else None
    options = {"metric": data.draw(st.sampled_from(METRICS)), "mask": mask, "num_levels": num_levels}
    assert_right(quantize(z, codebooks, sizes, **options, device=device), z, codebooks, sizes, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [8, 130])
def test_one_level_is_vector_quantize(dim, dtype, device):
    """To the bit, forward and backward; then further levels, on what the ones before left over."""
    sizes = (33, 7)
    z, codebooks = on(device, torch.randn(1, 20, dim).to(dtype), torch.randn(1, 40, dim).to(dtype))
    z[0, 3, 0] = torch.inf
    mask = torch.rand(1, 20, device=device) < 0.8
    codes = codebooks[:, :33]
    one = residual_quantize(z, codes, [33], "l2", mask, None, None)
    alone = vector_quantize(z, codes, "l2", mask)
    for a, b in zip(one, alone, strict=True):
        assert same_bits(a.reshape(b.shape), b)
    grad = torch.randn_like(z)
    grad[0, 5] = -0.0
    for gradient in GRADIENTS:
        for weight in (one[2], None):
            a = residual_quantize_backward(grad, weight, z, codes, [33], one[1], one[3], gradient)
            weight = weight if weight is None else alone[2]
            b = vector_quantize_backward(grad, weight, z, codes, alone[1], alone[3], gradient)
            assert same_bits(a, b)

    _, indices, mse, valid_rows = residual_quantize(z, codebooks, list(sizes), "l2", mask, None, None)
    total = None
    for level, left in enumerate(residuals(z.cpu(), codebooks.cpu(), sizes, indices.cpu())):
        residual, codes, index = on(device, *left)
        has_code = index >= 0
        _, expected, error, rows = vector_quantize(residual, codes, "l2", has_code)
        assert torch.equal(index, expected)
        assert (mse[0, level], valid_rows[0, level]) == (error, rows)
        wide_grad = grad.to(residual.dtype)
        term = vector_quantize_backward(wide_grad, error, residual, codes, index, rows, "rotation")
        total = term if total is None else torch.where(has_code.unsqueeze(-1), total + term, total)
    actual = residual_quantize_backward(grad, mse, z, codebooks, list(sizes), indices, valid_rows, "rotation")
    assert same_bits(actual, total.to(dtype))


def test_negative_zeros(device):
    """A sum starts with the first code, not with zero."""
    z, codebooks = torch.zeros(1, 4, 3), torch.full((1, 2, 3), -0.0)
    quantized, *_ = quantize(z, codebooks, (1, 1), device=device)
    assert same_bits(quantized, torch.full_like(z, -0.0))


def test_rows_without_code(device):
    z, codebooks = torch.randn(1, 9, 4), torch.randn(1, 9, 4)
    good, good_indices, *_ = quantize(z, codebooks, (3, 3, 3), device=device)
    z[0, 2, 1], z[0, 4, 0] = torch.nan, -torch.inf
    mask = torch.arange(9).unsqueeze(0) != 6
    num_levels = torch.tensor([[3, 2, 1, 0, 0, 9, 3, -4, 3]])
    quantized, indices, _, valid_rows = quantize(
        z, codebooks, (3, 3, 3), mask=mask, num_levels=num_levels, device=device
    )
    expected = good_indices.masked_fill(torch.arange(3) >= num_levels.unsqueeze(-1), -1)
    expected[0, [2, 4, 6]] = -1
    assert torch.equal(indices, expected)
    assert valid_rows.tolist() == [[4, 4, 3]]
    assert quantized[0, 2].isnan().all()
    assert quantized[0, [3, 4, 6, 7]].tolist() == [[0.0] * 4] * 4
    assert same_bits(quantized[0, [0, 5, 8]], good[0, [0, 5, 8]])


@pytest.mark.parametrize("dim", [4, 130])
def test_residuals_that_become_invalid(dim, device):
    """Two codes, each valid, leave a residual whose norm is too large; then a level without a valid code."""
    z, codebooks = torch.randn(1, 6, dim), torch.randn(1, 6, dim)
    codebooks[0, 2, 0] = 9e18
    codebooks[0, 3, 0] = 9e18
    result = quantize(z, codebooks, (2, 1, 1, 2), device=device)
    assert_right(result, z, codebooks, (2, 1, 1, 2))
    assert (result[1] >= 0).all(1).tolist() == [[True, True, True, False]]
    assert result[0].isnan().all()
    codebooks[0, 2:4] = torch.nan
    quantized, indices, mse, valid_rows = quantize(z, codebooks, (2, 2, 2), device=device)
    assert (indices[..., 0] >= 0).all()
    assert indices[..., 1:].eq(-1).all()
    assert quantized.isnan().all()
    assert mse[0, 1:].tolist() == valid_rows[0, 1:].tolist() == [0, 0]


def test_given_indices(device):
    """What others chose is taken, as long as it is a code; a row ends where it is not."""
    z, codebooks = torch.randn(2, 40, 5), torch.randn(2, 20, 5)
    chosen = torch.stack([torch.randint(0, size, (2, 40)) for size in (9, 4, 7)], -1)
    for row, (level, wild) in enumerate([(0, -1), (1, 4), (1, 2**40), (2, 7), (0, -(2**62)), (2, -1)]):
        chosen[0, row, level] = wild
    mask, num_levels = torch.rand(2, 40) < 0.8, torch.randint(0, 4, (2, 40))
    mask[0, :6], num_levels[0, :6] = True, 3
    quantized, indices, mse, valid_rows = quantize(
        z, codebooks, (9, 4, 7), "cosine", mask, num_levels, chosen, device=device
    )
    expected = torch.where(mask.unsqueeze(-1) & (torch.arange(3) < num_levels.unsqueeze(-1)), chosen, -1)
    for row, level in enumerate([0, 1, 1, 2, 0, 2]):
        expected[0, row, level:] = -1
    assert torch.equal(indices, expected)
    assert quantized[0, :6].isnan().all()
    total = torch.zeros(2, 40, 5)
    for level, (_, codes, index) in enumerate(residuals(z, codebooks, (9, 4, 7), expected)):
        code = torch.stack([c[i.clamp(min=0)] for c, i in zip(codes, index, strict=True)])
        total = torch.where((index >= 0).unsqueeze(-1), total + code, total)
        assert torch.equal(valid_rows[:, level], (index >= 0).sum(1))
    total[0, :6] = torch.nan
    assert same_bits(quantized, total)
    assert (mse > 0).all()
    own = quantize(z, codebooks, (9, 4, 7), device=device)
    for a, b in zip(quantize(z, codebooks, (9, 4, 7), indices=own[1], device=device), own, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics(dtype, device):
    """To the bit those of an independent emulation, of the residuals."""
    z, codebooks = torch.randn(2, 300, 5).to(dtype), torch.randn(2, 74, 5).to(dtype)
    num_levels = torch.randint(0, 4, (2, 300))
    indices = quantize(z, codebooks, num_levels=num_levels, device=device)[1]
    arguments = on(device, z, codebooks, list(SIZES), indices)
    counts, sums = (t.cpu() for t in residual_statistics(*arguments))
    assert sums.dtype == wide(dtype)
    levels = zip(counts.split(list(SIZES), 1), sums.split(list(SIZES), 1), strict=True)
    for (residual, _, index), (level_counts, level_sums) in zip(
        residuals(z, codebooks, SIZES, indices), levels, strict=True
    ):
        for head in range(2):
            expected = vq_emulation.code_statistics(residual[head].numpy(), index[head].numpy(), level_counts.shape[1])
            assert level_counts[head].tolist() == expected[0].tolist()
            assert same_bits(level_sums[head], torch.from_numpy(expected[1]))


def run(z, codebooks, grad, **options):
    """Result, and gradients of (quantized . grad + losses)."""
    z, codebooks = z.clone().requires_grad_(), codebooks.clone().requires_grad_()
    result = vqkernels.residual_quantize(z, codebooks, commitment_weight=0.25, codebook_weight=2.0, **options)
    objective = (torch.nan_to_num(result.quantized) * grad).sum() + result.losses.sum()
    return result, *torch.autograd.grad(objective, (z, codebooks))


def tolerance_of_rows(z, codebooks, indices, grad, gradient, dtype):
    """A priori bound of the error of z's gradient, of one head, summed over the levels: see test_vector_quantize.py."""
    u, dim = UNIT_ROUNDOFF[wide(dtype)], z.shape[-1]
    residual, total, drift = z, 0, 0
    for index, codes in zip(indices.unbind(-1), codebooks, strict=True):
        has_code = (index >= 0).unsqueeze(-1)
        c = codes[index.clamp(min=0)]
        norm_r, norm_c, norm_g = (x.norm(dim=-1, keepdim=True) for x in (residual, c, grad))
        size = norm_g
        relative = (2 * dim + 16) * u + drift / norm_r
        if gradient == "rotation":
            sum_norm = (residual / norm_r + c / norm_c).norm(dim=-1, keepdim=True)
            size = norm_c / norm_r * norm_g * (1 + 16 / torch.where(sum_norm > 0, sum_norm, 1))
        size = size + 2 * 0.25 / dim * (norm_r + norm_c)
        total = total + torch.where(has_code, relative * size, 0)
        residual = torch.where(has_code, residual - c, residual)
        drift = drift + u * residual.norm(dim=-1, keepdim=True)
    return total


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 8, 65])
def test_gradients_against_reference(dim, dtype, gradient, device):
    z, codebooks = torch.randn(2, 15, dim).to(dtype), torch.randn(2, 3, 7, dim).to(dtype)
    grad = torch.randn(2, 15, dim).to(dtype)
    options = {"gradient": gradient, "metric": METRICS[dim % 3], "statistics": True}
    masks = {"mask": torch.rand(2, 15) < 0.9, "num_levels": torch.randint(0, 4, (2, 15))}
    exact = z.double(), codebooks.double(), grad.double()
    expected, expected_z, expected_codebooks = run(*exact, **options, **masks, backend="reference")
    masks = {name: value.to(device) for name, value in masks.items()}
    actual, grad_z, grad_codebooks = run(*on(device, z, codebooks, grad), **options, **masks, backend="triton")
    assert torch.equal(actual.indices.cpu(), expected.indices)
    assert torch.equal(actual.counts.cpu(), expected.counts)

    u, out = UNIT_ROUNDOFF[wide(dtype)], UNIT_ROUNDOFF[dtype]
    largest = exact[0].abs().amax() + 3 * exact[1].abs().amax()
    error = (actual.quantized.double().cpu() - expected.quantized).abs()
    assert (error <= 3 * u * largest + out * expected.quantized.abs()).all()
    # Every element of a residual is at most the largest, and has been rounded twice.
    assert ((actual.losses.cpu() - expected.losses).abs() <= (dim + 14) * u * 2.25 * largest**2).all()
    tolerance = torch.stack(
        [
            tolerance_of_rows(*(x[head] for x in (*exact[:2], expected.indices, exact[2])), gradient, dtype)
            for head in range(2)
        ]
    )
    assert ((grad_z.cpu() - expected_z).abs() <= 2 * tolerance + out * expected_z.abs()).all()
    # Sums of at most 15 rows, then a product and a difference with the code; a level has at least one row.
    size = 4 / dim * largest + exact[2].abs().amax()
    tolerance = 15 * 25 * u * size + out * expected_codebooks.abs()
    assert ((grad_codebooks.cpu() - expected_codebooks).abs() <= tolerance).all()


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_backward_options(gradient, device):
    """Absent gradients are zero; codes that are none give nothing."""
    z, codebooks, grad = on(device, torch.randn(2, 33, 5), torch.randn(2, 12, 5), torch.randn(2, 5, 33).mT)
    _, indices, mse, valid_rows = residual_quantize(z, codebooks, [4, 8], "l2", None, None, None)

    def backward(g, w, index=indices):
        return residual_quantize_backward(g, w, z, codebooks, [4, 8], index, valid_rows, gradient)

    assert torch.equal(backward(None, None), torch.zeros_like(z))
    through = backward(grad, None)
    if gradient == "straight_through":
        assert torch.equal(through, 2 * grad)
    elif gradient == "none":
        assert torch.equal(through, torch.zeros_like(z))
    wild = indices.clone()
    wild[:, ::2, 0], wild[:, ::2, 1] = 2**40, 8
    grad_z = backward(grad, mse, wild)
    assert torch.equal(grad_z[:, ::2], torch.zeros_like(grad_z[:, ::2]))
    assert same_bits(grad_z[:, 1::2], backward(grad, mse)[:, 1::2])
    narrow = residual_quantize_backward(
        grad.bfloat16(), mse, z.bfloat16(), codebooks.bfloat16(), [4, 8], indices, valid_rows, gradient
    )
    assert narrow.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_quantize(rows, device):
    z, codebooks = on(device, torch.full((1, rows, 3), torch.nan), torch.randn(1, 6, 3))
    quantized, indices, mse, valid_rows = residual_quantize(z, codebooks, [2, 4], "l2", None, None, None)
    assert (quantized.shape, indices.tolist()) == (z.shape, [[[-1, -1]] * rows])
    assert mse.tolist() == valid_rows.tolist() == [[0, 0]]
    grad_z = residual_quantize_backward(
        torch.ones_like(z), torch.ones_like(mse), z, codebooks, [2, 4], indices, valid_rows, "rotation"
    )
    assert torch.equal(grad_z, torch.zeros_like(z))
    counts, sums = residual_statistics(z, codebooks, [2, 4], indices)
    assert torch.equal(counts, torch.zeros_like(counts))
    assert torch.equal(sums, torch.zeros_like(codebooks))


def test_repeats_and_parts(device):
    """Bitwise the same again, and for any part of the rows."""
    z, codebooks = on(device, torch.randn(1, 100, 12), torch.randn(1, 74, 12))
    first, second = (residual_quantize(z, codebooks, list(SIZES), "l2", None, None, None) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    part = residual_quantize(z[:, 37:50], codebooks, list(SIZES), "l2", None, None, None)
    assert all(same_bits(a[:, 37:50], b) for a, b in zip(first[:2], part[:2], strict=True))


@pytest.mark.parametrize("heads", [False, True])
def test_public_function(heads, device):
    """Lists of codebooks, leading dimensions and beams, against the reference in float64."""
    z = torch.randn(2, 3, 7, 6)
    codebooks = [torch.randn(*([2] if heads else []), size, 6) for size in (9, 5, 11)]
    options = {"num_levels": torch.tensor([[3, 2, 0], [1, 3, 3]]), "statistics": True}
    for beam in ({}, {"beam_size": 3, "beam_weights": [1.0, 0.5, 1.0]}):
        expected = vqkernels.residual_quantize(
            z.double(), [c.double() for c in codebooks], **options, **beam, backend="reference"
        )
        options["num_levels"] = options["num_levels"].to(device)
        actual = vqkernels.residual_quantize(z.to(device), on(device, *codebooks), **options, **beam, backend="triton")
        options["num_levels"] = options["num_levels"].cpu()
        assert torch.equal(actual.indices.cpu(), expected.indices)
        for a, b in zip(actual.counts, expected.counts, strict=True):
            assert torch.equal(a.cpu(), b)
        size = sum(codes.abs().amax() for codes in codebooks)
        assert ((actual.quantized.cpu() - expected.quantized).abs() <= 3 * 2.0**-24 * size).all()
        for a, b, count in zip(actual.sums, expected.sums, expected.counts, strict=True):
            bound = (count + 3).unsqueeze(-1) * count.unsqueeze(-1) * 2.0**-24 * (z.abs().amax() + 2 * size)
            assert ((a.cpu() - b).abs() <= bound).all()


def test_beam_candidates_are_those_of_topk(device):
    """With weight on the last error alone and every code kept, a beam search finds the best pair of all."""
    z, codebooks = on(device, torch.randn(12, 4), torch.randn(2, 5, 4))
    result = vqkernels.residual_quantize(z, codebooks, beam_size=25, beam_weights=[0.0, 1.0], backend="triton")
    pairs = (codebooks[0].double()[:, None] + codebooks[1].double()[None]).reshape(25, 4).cpu()
    best = torch.cdist(z.double().cpu(), pairs).argmin(1)
    assert torch.equal(result.indices.cpu(), torch.stack([best // 5, best % 5], 1))
    found, _ = topk_codes(z[None], codebooks[:1], 5, "l2", None)
    assert torch.equal(found.sort(dim=-1).values.cpu(), torch.arange(5).expand(1, 12, 5))
