"""Residual quantization: against an emulation bit for bit, the public operations level by level, and invariances."""

import itertools

import numpy as np
import pytest
import torch
import vq_emulation
import vq_residual
from vq_cases import DIMS, DTYPES, KINDS, LEVELS, METRICS, cpu_level, make_inputs, same_bits
from vq_residual import assert_same, level_inputs

import vqkernels

GRADIENTS = ("straight_through", "rotation", "none")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def emulated(z, codebooks, metric="l2", mask=None, num_levels=None):
    quantized, indices, mse, _, residuals = vq_residual.residual_quantize(
        z.float().numpy(),
        [c.float().numpy() for c in codebooks],
        metric,
        None if mask is None else mask.numpy(),
        None if num_levels is None else num_levels.numpy(),
    )
    statistics = [
        vq_emulation.code_statistics(r, i, len(c)) for r, i, c in zip(residuals, indices.T, codebooks, strict=True)
    ]
    counts, sums = (tuple(torch.from_numpy(s) for s in part) for part in zip(*statistics, strict=True))
    if len({len(c) for c in codebooks}) == 1:
        counts, sums = torch.stack(counts), torch.stack(sums)
    return torch.from_numpy(quantized).to(z.dtype), torch.from_numpy(indices), torch.from_numpy(mse), counts, sums


def level_by_level(z, codebooks, metric="l2"):
    """With public operations, any dtype: quantized, indices, losses, counts, sums of the rows of one head."""
    wide = torch.float64 if torch.float64 in (z.dtype, codebooks[0].dtype) else torch.float32
    residual, quantized, results = z.to(wide), None, []
    for codes in codebooks:
        result = vqkernels.vector_quantize(residual, codes, metric=metric, statistics=True)
        results.append(result)
        quantized = result.quantized if quantized is None else quantized + result.quantized
        residual = residual - result.quantized
    return (
        quantized.to(z.dtype),
        torch.stack([r.indices for r in results], -1),
        torch.stack([r.loss for r in results]),
        torch.stack([r.counts for r in results]),
        torch.stack([r.sums for r in results]),
    )


@pytest.mark.parametrize("dim", [*DIMS, 128])
@pytest.mark.parametrize("metric", METRICS)
def test_levels_equal_emulation(dim, metric):
    for rows, sizes in [(1, (5,)), (70, (6, 65, 1, 33)), (9, (7, 7))]:
        z, codebooks = level_inputs("normal", rows, sizes, dim)
        expected = emulated(z, codebooks, metric)
        for level, threads in itertools.product(LEVELS, (1, 2, 3)):
            torch.set_num_threads(threads)
            with cpu_level(level):
                assert_same(vqkernels.residual_quantize(z, codebooks, metric=metric, statistics=True), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("level", LEVELS)
def test_hard_inputs_equal_emulation(kind, metric, level):
    with cpu_level(level):
        for rows, sizes, dim in [(33, (13, 6), 8), (130, (40, 40, 3), 3)]:
            z, codebooks = level_inputs(kind, rows, sizes, dim)
            expected = emulated(z, codebooks, metric)
            if kind == "broken":
                assert (expected[1] == -1).any()
            assert_same(vqkernels.residual_quantize(z, codebooks, metric=metric, statistics=True), expected)


@pytest.mark.parametrize("z_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("codebook_dtype", FLOAT_DTYPES)
def test_dtypes_equal_emulation(z_dtype, codebook_dtype):
    z, codebooks = level_inputs("normal", 80, (20, 30, 20), 12, z_dtype, codebook_dtype)
    mask, num_levels = torch.rand(80) > 0.2, torch.randint(0, 4, (80,))
    expected = emulated(z, codebooks, "l2", mask, num_levels)
    for level in LEVELS:
        with cpu_level(level):
            result = vqkernels.residual_quantize(z, codebooks, mask=mask, num_levels=num_levels, statistics=True)
            assert_same(result, expected)


@pytest.mark.parametrize("z_dtype", DTYPES)
@pytest.mark.parametrize("codebook_dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_equals_public_operations_level_by_level(z_dtype, codebook_dtype, metric):
    z, codebooks = level_inputs("normal", 2500, (40, 40, 40), 12, z_dtype, codebook_dtype)
    result = vqkernels.residual_quantize(z, torch.stack(codebooks), metric=metric, statistics=True)
    assert_same(result, level_by_level(z, codebooks, metric))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", ["normal", "broken"])
def test_one_level_is_vector_quantize(dtype, gradient, kind):
    z, codebook = make_inputs(kind, 300, 20, 12)
    results = []
    for quantize in (
        lambda z, c, **options: vqkernels.vector_quantize(z, c, **options),
        lambda z, c, **options: vqkernels.residual_quantize(z, c.unsqueeze(0), **options),
    ):
        rows, codes = z.to(dtype).requires_grad_(), codebook.to(dtype).requires_grad_()
        result = quantize(
            rows,
            codes,
            gradient=gradient,
            commitment_weight=0.25,
            codebook_weight=0.7,
            statistics=True,
            mask=torch.arange(300) % 7 > 0,
        )
        g = torch.linspace(-1, 1, z.numel()).reshape(z.shape).to(dtype)
        torch.autograd.backward([result.quantized, result[2].sum()], [g, None])
        results.append([t.detach().flatten() for t in (*result, rows.grad, codes.grad)])
    assert_same(*results)


def test_batch_split_and_repeats():
    z, codebooks = torch.randn(2100, 16), torch.randn(4, 50, 16)
    whole = vqkernels.residual_quantize(z, codebooks)
    for size in (1, 7, 64, 700):
        rows = slice(300, 300 + size)
        part = vqkernels.residual_quantize(z[rows].clone(), codebooks)
        assert torch.equal(part.indices, whole.indices[rows])
        assert same_bits(part.quantized, whole.quantized[rows])
    for _ in range(3):
        assert_same(vqkernels.residual_quantize(z, codebooks), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_independent(dtype):
    z, codebooks = torch.randn(3, 4, 33, 8).to(dtype), torch.randn(3, 2, 20, 8).to(dtype)
    mask, num_levels = torch.rand(3, 4, 33) > 0.3, torch.randint(0, 3, (3, 4))
    result = vqkernels.residual_quantize(z, codebooks, mask=mask, num_levels=num_levels, statistics=True)
    heads = [
        vqkernels.residual_quantize(z[h], codebooks[h], mask=mask[h], num_levels=num_levels[h], statistics=True)
        for h in range(3)
    ]
    assert_same(result, [torch.stack(list(parts)) for parts in zip(*heads, strict=True)])
    by_level = vqkernels.residual_quantize(z, list(codebooks.unbind(1)), mask=mask, num_levels=num_levels)
    assert_same(by_level[:3], result[:3])
    uneven = vqkernels.residual_quantize(z, [codebooks[:, 0], codebooks[:, 1, :5]], statistics=True)
    assert [c.shape for c in uneven.counts] == [(3, 20), (3, 5)]
    assert [s.shape for s in uneven.sums] == [(3, 20, 8), (3, 5, 8)]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_forms_of_num_levels(backend):
    z, codebooks = torch.randn(3, 5, 4, 8), torch.randn(4, 20, 8)
    full = torch.randint(0, 5, (3, 5, 4))
    for levels in (0, 2, 4, torch.tensor(3), torch.tensor([0, 4, 2], dtype=torch.int32), full[..., 0], full):
        result = vqkernels.residual_quantize(z, codebooks, num_levels=levels, backend=backend)
        values = torch.as_tensor(levels)
        rows = values.reshape(*values.shape, *[1] * (3 - values.ndim)).expand(3, 5, 4)
        runs = torch.arange(4) < rows.unsqueeze(-1)
        everything = vqkernels.residual_quantize(z, codebooks, backend=backend)
        assert torch.equal(result.indices, everything.indices.masked_fill(~runs, -1))
        for n in range(5):
            first = vqkernels.residual_quantize(z, codebooks[: max(n, 1)], backend=backend).quantized
            expected = first if n else torch.zeros_like(z)
            assert same_bits(result.quantized[rows == n].detach(), expected[rows == n])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rows_without_codes(backend):
    """NaN where a level should have run, zero where none should; a residual may become invalid on the way."""
    z, codebooks = torch.randn(8, 4), torch.randn(3, 6, 4)
    z[1], z[2, 0] = torch.nan, torch.inf
    mask = torch.arange(8) != 2
    result = vqkernels.residual_quantize(z, codebooks, mask=mask, backend=backend, statistics=True)
    assert result.indices[1].tolist() == result.indices[2].tolist() == [-1, -1, -1]
    assert result.quantized[1].isnan().all()
    assert torch.equal(result.quantized[2], torch.zeros(4))
    edge = torch.full((1, 4), 4.5e18)  # valid; twice as much is not
    assert vqkernels.nearest_code(edge, -edge, metric="dot").item() == 0
    lost = vqkernels.residual_quantize(edge, torch.stack([-edge, edge, edge]), metric="dot", backend=backend)
    assert lost.indices.tolist() == [[0, -1, -1]]
    assert lost.quantized.isnan().all()
    assert lost.losses[1:].tolist() == [0, 0]
    assert lost.losses[0].isfinite()
    codebooks[1] = torch.inf
    none = vqkernels.residual_quantize(torch.randn(5, 4), codebooks, backend=backend, statistics=True)
    assert (none.indices[:, 0] >= 0).all()
    assert (none.indices[:, 1:] == -1).all()
    assert none.quantized.isnan().all()
    assert none.counts[1:].sum() == 0
    assert none.sums[1:].eq(0).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_rows(backend):
    z, codebooks = torch.randn(2, 0, 4, requires_grad=True), torch.randn(3, 6, 4, requires_grad=True)
    result = vqkernels.residual_quantize(z, codebooks, statistics=True, codebook_weight=1.0, backend=backend)
    assert result.indices.shape == (2, 0, 3)
    assert torch.equal(result.losses.detach(), torch.zeros(3))
    assert torch.equal(result.counts, torch.zeros(3, 6, dtype=torch.int64))
    assert torch.equal(result.sums, torch.zeros(3, 6, 4))
    result.losses.sum().backward()
    assert torch.equal(codebooks.grad, torch.zeros(3, 6, 4))


def test_strided_inputs():
    z, codebooks = torch.randn(8, 50).t(), torch.randn(8, 3, 20).permute(1, 2, 0)
    expected = vqkernels.residual_quantize(z.contiguous(), codebooks.contiguous(), statistics=True)
    assert_same(vqkernels.residual_quantize(z, codebooks, statistics=True), expected)
    one = torch.randn(8).expand(50, 8)
    shared = codebooks[:1].expand(3, 20, 8)
    assert_same(
        vqkernels.residual_quantize(one, shared, num_levels=torch.tensor(2).expand(50)),
        vqkernels.residual_quantize(one.clone(), shared.clone(), num_levels=torch.full((50,), 2)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_specification(dtype):
    """The plain PyTorch form rounds scores otherwise: with codes far apart it chooses the same."""
    codebooks = [torch.randn(7, 12).to(dtype) * 4.0**-q for q in range(3)]
    z = sum(c.double()[torch.randint(0, 7, (90,))] for c in codebooks).to(dtype)
    options = {"statistics": True, "num_levels": torch.arange(90) % 4, "codebook_weight": 0.5}
    result = vqkernels.residual_quantize(z, codebooks, **options)
    expected = vqkernels.residual_quantize(z, codebooks, backend="reference", **options)
    assert torch.equal(result.indices, expected.indices)
    assert same_bits(result.quantized, expected.quantized)
    assert torch.equal(result.counts, expected.counts)
    eps = torch.finfo(result.losses.dtype).eps
    # Up to 90 * 12 squares of differences, each rounded, added in another order.
    assert torch.all((result.losses - expected.losses).abs() <= 90 * 12 * eps * expected.losses)
    bound = 90 * torch.finfo(torch.float32).eps * 90 * z.abs().max().float()
    assert torch.all((result.sums - expected.sums).abs() <= bound)


def squared_errors(z, codebooks, tuples):
    """float64 [len(z), len(tuples), Q]: the squared norm of what is left after every level."""
    residual = z.double().unsqueeze(1).expand(-1, len(tuples), -1)
    errors = []
    for q, codes in enumerate(codebooks):
        residual = residual - codes.double()[tuples[:, q]]
        errors.append(residual.square().sum(-1))
    return torch.stack(errors, -1)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("weights", [None, (0.0, 0.0, 1.0), (1.0, 0.5, 0.25)])
def test_beam_search_finds_the_best_tuple(backend, weights):
    """A beam that drops nothing gives what trying all tuples gives; a narrower one is never worse than no beam."""
    z, codebooks = torch.randn(50, 3), [torch.randn(5, 3), torch.randn(4, 3), torch.randn(3, 3)]
    tuples = torch.tensor(list(itertools.product(range(5), range(4), range(3))))
    costs = squared_errors(z, codebooks, tuples) @ torch.tensor(weights or (1.0, 1.0, 1.0), dtype=torch.float64)
    found = {
        size: vqkernels.residual_quantize(z, codebooks, beam_size=size, beam_weights=weights, backend=backend)
        for size in (None, 1, 3, 60)
    }
    cost = {
        size: costs.gather(1, (tuples == result.indices.unsqueeze(1)).all(-1).double().argmax(1, keepdim=True))[:, 0]
        for size, result in found.items()
    }
    # Costs are sums of rounded squares in float32: the best is the best but for their rounding.
    bound = 20 * torch.finfo(torch.float32).eps * costs.amax(1)
    assert torch.all(cost[60] <= costs.amin(1) + bound)
    assert cost[60].mean() <= cost[3].mean() <= cost[1].mean()
    assert cost[60].mean() < cost[1].mean()
    assert_same(found[1], found[None])
    gathered = sum(codes[found[60].indices[:, q]] for q, codes in enumerate(codebooks))
    assert same_bits(found[60].quantized, gathered)


def test_beam_search_per_row():
    """Masked, broken and shorter rows under a beam; a row alone gives what it gives in the batch."""
    z, codebooks = torch.randn(2, 20, 6), torch.randn(3, 9, 6)
    z[0, 3], codebooks[1, 2] = torch.nan, torch.inf
    mask, num_levels = torch.arange(20) != 5, torch.tensor([3, 2])
    options = {"beam_size": 4, "statistics": True, "codebook_weight": 1.0}
    result = vqkernels.residual_quantize(z, codebooks, mask=mask.expand(2, 20), num_levels=num_levels, **options)
    assert (result.indices[0, 3] == -1).all()
    assert (result.indices[:, 5] == -1).all()
    assert (result.indices[1, :, 2] == -1).all()
    assert (result.indices[0, 6:] >= 0).all()
    assert (result.indices[:, :, 1] != 2).all()
    assert result.quantized[0, 3].isnan().all()
    assert torch.equal(result.quantized[:, 5], torch.zeros(2, 6))
    shorter = vqkernels.residual_quantize(z[1], codebooks[:2], mask=mask, beam_size=4)
    assert torch.equal(result.indices[1, :, :2], shorter.indices)
    for i in (0, 7, 19):
        alone = vqkernels.residual_quantize(z[0, i], codebooks, beam_size=4)
        assert torch.equal(alone.indices, result.indices[0, i])
    chosen = result.indices[0, 0]
    losses = vqkernels.residual_quantize(z[0, 0], codebooks, beam_size=4).losses
    left = z[0, 0].double() - torch.stack([codebooks[q, chosen[q]] for q in range(3)]).double().cumsum(0)
    torch.testing.assert_close(losses.double(), left.square().mean(1), rtol=1e-5, atol=0)


def test_given_codes_are_taken():
    """The operation behind the beam search: codes chosen elsewhere, of which the first -1 ends a row."""
    z, codebooks = torch.randn(1, 4, 8), torch.randn(1, 10, 8)
    chosen = torch.tensor([[[2, 3], [-9, 3], [5, -1], [0, 0]]])
    quantized, indices, mse, valid_rows = torch.ops.vqkernels.residual_quantize(
        z, codebooks, [6, 4], "l2", None, torch.tensor([[2, 2, 2, 1]]), chosen
    )
    assert indices.tolist() == [[[2, 3], [-1, -1], [5, -1], [0, -1]]]
    assert valid_rows.tolist() == [[3, 1]]
    assert torch.equal(quantized[0, 0], codebooks[0, 2] + codebooks[0, 9])
    assert quantized[0, 1:3].isnan().all()
    assert torch.equal(quantized[0, 3], codebooks[0, 0])
    left = z[0, 0] - codebooks[0, 2] - codebooks[0, 9]
    expected = np.float32(vq_emulation.row_dot(left[None].numpy(), left[None].numpy())[0].astype(np.float64) / 8)
    assert mse[0, 1].item() == expected


@pytest.mark.parametrize("gradient", ["straight_through", "none"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_direct_gradient_goes_on_behind_a_level_without_a_code(level, gradient):
    """As if the row had not this level; small integers, so that float32 is exact."""
    g = torch.Generator().manual_seed(0)
    z, codebooks, grad = (torch.randint(-8, 9, (1, n, 8), generator=g).float() for n in (5, 13, 5))
    sizes, indices = [6, 4, 3], [[-1, 3, 0], [2, -1, 1], [-7, -1, 2], [5, 0, -1], [-1, -1, -1]]
    grad_mse = torch.tensor([[16.0, 32.0, 64.0]])
    expected = torch.zeros_like(z)
    for row, codes in enumerate(indices):
        residual = z[0, row]
        for q, code in enumerate(codes):
            if code >= 0:
                residual = residual - codebooks[0, sum(sizes[:q]) + code]
                expected[0, row] += grad_mse[0, q] * 2 / (4 * 8) * residual
                expected[0, row] += grad[0, row] if gradient == "straight_through" else 0
    with cpu_level(level):
        found = torch.ops.vqkernels.residual_quantize_backward(
            grad, grad_mse, z, codebooks, sizes, torch.tensor([indices]), torch.full((1, 3), 4), gradient
        )
    assert torch.equal(found, expected)
