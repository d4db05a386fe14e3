"""Residual quantization: against an emulation bit for bit, the public operations level by level, and invariances."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
import vq_emulation
import vq_residual
from torch._dynamo.testing import CompileCounterWithBackend
from vq_cases import DIMS, DTYPES, KINDS, LEVELS, METRICS, cpu_level, make_inputs, same_bits

import vqkernels

GRADIENTS = ("straight_through", "rotation", "none")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        if isinstance(a, tuple):
            assert_same(a, b)
        else:
            assert (a is None and b is None) or same_bits(a.detach(), b.detach())


def level_inputs(kind, rows, sizes, dim, dtype=torch.float32, codebook_dtype=None):
    z = make_inputs(kind, rows, sizes[0], dim)[0].to(dtype)
    codes = [make_inputs(kind, rows, size, dim, seed=q)[1] * 0.7**q for q, size in enumerate(sizes)]
    return z, [c.to(codebook_dtype or dtype) for c in codes]


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


def separated(rows, dim=4, levels=3):
    """Codes far apart at every level and rows near their sums: a step of gradcheck changes no choice."""
    codebooks = torch.stack([torch.randn(4, dim, dtype=torch.float64) * 3 * 8.0**-q for q in range(levels)])
    z = sum(c[torch.randint(0, 4, (rows,))] for c in codebooks) + 1e-3 * torch.rand(rows, dim, dtype=torch.float64)
    return z, codebooks


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_the_losses(backend, masked):
    """One input and weight at a time, and one level: the residual counts as constant to the other codes."""
    z, codebooks = separated(6)
    options = {"num_levels": torch.tensor([3, 2, 0, 3, 1, 3]), "mask": torch.arange(6) != 3} if masked else {}

    def commitment(z):
        return vqkernels.residual_quantize(z, codebooks, commitment_weight=0.7, backend=backend, **options).losses

    assert torch.autograd.gradcheck(commitment, z.clone().requires_grad_())
    for level in range(3):

        def codebook_loss(codes, level=level):
            levels = [*codebooks[:level], codes, *codebooks[level + 1 :]]
            return vqkernels.residual_quantize(
                z, levels, commitment_weight=0.0, codebook_weight=1.3, backend=backend, **options
            ).losses[level]

        assert torch.autograd.gradcheck(codebook_loss, codebooks[level].clone().requires_grad_())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("heads", [False, True])
def test_gradcheck_of_gathered_rows(backend, heads):
    z, codebooks = separated(5)
    if heads:
        z, codebooks = torch.stack([z, z + 1e-4]), torch.stack([codebooks, codebooks])

    def gathered(codebooks):
        return vqkernels.residual_quantize(z, codebooks, gradient="none", backend=backend).quantized.square()

    assert torch.autograd.gradcheck(gathered, codebooks.clone().requires_grad_())


def gradients_of(z, codebooks, g, g_losses, **options):
    z, codebooks = z.clone().requires_grad_(), [c.clone().requires_grad_() for c in codebooks]
    result = vqkernels.residual_quantize(z, codebooks, **options)
    torch.autograd.backward([result.quantized, result.losses], [g, g_losses.to(result.losses.dtype)])
    return z.grad, *(c.grad for c in codebooks)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("z_dtype", DTYPES)
@pytest.mark.parametrize("codebook_dtype", DTYPES)
def test_gradients_are_sums_of_the_levels(gradient, z_dtype, codebook_dtype):
    """Of `vector_quantize` in float64 on the residuals, which has tests of its own."""
    z, codebooks = level_inputs("normal", 60, (9, 9, 5), 12, z_dtype, codebook_dtype)
    g, g_losses = torch.randn(60, 12).to(z_dtype), torch.tensor([1.0, -0.5, 2.0])
    weights = {"gradient": gradient, "commitment_weight": 0.25, "codebook_weight": 1.5}
    actual = gradients_of(z, codebooks, g, g_losses, **weights)
    wide = torch.float64 if torch.float64 in (z_dtype, codebook_dtype) else torch.float32
    indices = vqkernels.residual_quantize(z, codebooks).indices
    expected = [torch.zeros(60, 12, dtype=torch.float64)]
    residual = z.to(wide)
    for q, codes in enumerate(codebooks):
        rows, level = (t.detach().double().clone().requires_grad_() for t in (residual, codes))
        result = vqkernels.vector_quantize(rows, level, **weights)
        assert torch.equal(result.indices, indices[:, q])
        torch.autograd.backward([result.quantized, result.loss], [g.double(), g_losses[q].double()])
        expected[0] += rows.grad if rows.grad is not None else 0
        expected.append(level.grad)
        residual = residual - codes.detach()[indices[:, q]].to(wide)
    for value, wanted in zip(actual, expected, strict=True):
        result_type = torch.finfo(value.dtype)
        bound = (
            100 * torch.finfo(wide).eps * (1 + wanted.abs().max())
            + result_type.eps * wanted.abs()
            + result_type.eps * result_type.smallest_normal
        )
        assert torch.all((value.double() - wanted).abs() <= bound)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_equal_specification(gradient):
    z, codebooks = separated(40, levels=4)
    z[3] = torch.nan
    g, g_losses = torch.randn(40, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    options = {
        "gradient": gradient,
        "codebook_weight": 0.3,
        "num_levels": torch.arange(40) % 5,
        "mask": torch.arange(40) != 7,
    }
    actual = gradients_of(z, codebooks, g, g_losses, **options)
    expected = gradients_of(z, codebooks, g, g_losses, backend="reference", **options)
    for value, wanted in zip(actual, expected, strict=True):
        bound = 1000 * torch.finfo(torch.float64).eps * (1 + wanted.abs().max())
        assert torch.all((value - wanted).abs() <= bound)
    assert torch.equal(actual[0][3], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_agree_between_levels_and_threads(gradient, dtype):
    for rows, sizes, dim in [(5, (40, 7), 9), (600, (7, 7, 7), 65), (40, (30, 8), 8)]:
        z, codebooks = level_inputs("normal", rows, sizes, dim, dtype)
        g, g_losses = torch.randn(rows, dim).to(dtype), torch.randn(len(sizes))
        results = []
        for level, threads in itertools.product(LEVELS, (1, 2, 3, 1)):
            torch.set_num_threads(threads)
            with cpu_level(level):
                results.append(gradients_of(z, codebooks, g, g_losses, gradient=gradient, codebook_weight=0.5))
        for result in results[1:]:
            assert_same(result, results[0])


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


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(heads, dtype):
    ops = torch.ops.vqkernels
    z, codebooks = torch.randn(heads, 7, 4).to(dtype), torch.randn(heads, 12, 4).to(dtype)
    mask, num_levels = torch.rand(heads, 7) > 0.5, torch.randint(0, 4, (heads, 7))
    indices = torch.randint(-1, 3, (heads, 7, 3))
    grad_mse = torch.ones(heads, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    valid_rows = torch.full((heads, 3), 7)
    sizes = [5, 4, 3]
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    for op, args in (
        (ops.residual_quantize, (z, codebooks, sizes, "l2", mask, num_levels, None)),
        (ops.residual_quantize, (z, codebooks, sizes, "cosine", None, None, indices.clamp(min=0))),
        (
            ops.residual_quantize_backward,
            (torch.randn_like(z), grad_mse, z, codebooks, sizes, indices, valid_rows, "rotation"),
        ),
        (ops.residual_quantize_backward, (None, None, z, codebooks, sizes, indices, valid_rows, "none")),
        (ops.residual_statistics, (z, codebooks, sizes, indices)),
        (ops.topk_codes, (z, codebooks, 5, "l2", mask)),
    ):
        torch.library.opcheck(op.default, args, test_utils=utilities)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("beam_size", [None, 3])
def test_compile(gradient, beam_size):
    torch._dynamo.reset()

    def quantize(z, codebooks, num_levels):
        return vqkernels.residual_quantize(
            z,
            codebooks,
            num_levels=num_levels,
            gradient=gradient,
            codebook_weight=0.5,
            statistics=True,
            beam_size=beam_size,
        )

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(quantize, backend=graphs, fullgraph=True, dynamic=True)
    for rows in (20, 33, 64):
        outcomes = []
        for function in (compiled, quantize):
            torch.manual_seed(rows)
            z, codebooks = torch.randn(2, rows, 6, requires_grad=True), torch.randn(3, 9, 6, requires_grad=True)
            result = function(z, codebooks, torch.tensor([2, 3]))
            (result.quantized.square().sum() + result.losses.sum()).backward()
            outcomes.append([*result, z.grad, codebooks.grad])
        assert_same(*outcomes)
    assert graphs.frame_count == 1


PEAK = """
import sys, torch, vqkernels
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
torch.set_num_threads(1)
z, codebooks = torch.randn(8192, 8, requires_grad=True), torch.randn(4, 4096, 8, requires_grad=True)
call = {
    "forward": lambda: vqkernels.residual_quantize(z, codebooks),
    "statistics": lambda: vqkernels.residual_quantize(z, codebooks, statistics=True),
    "gradient": lambda: vqkernels.residual_quantize(z, codebooks, codebook_weight=1.0).losses.sum().backward(),
    "topk_codes": lambda: vqkernels.topk_codes(z, codebooks[0], 4),
    "reference": lambda: vqkernels.residual_quantize(z, codebooks, backend="reference"),
}[sys.argv[1]]
small = vqkernels.residual_quantize(z[:8], codebooks[:, :8], codebook_weight=1.0, statistics=True)
small.losses.sum().backward()  # what a first call loads
vqkernels.topk_codes(z[:8], codebooks[0], 4)
vqkernels.residual_quantize(z[:8], codebooks[:, :8], backend="reference")
open("/proc/self/clear_refs", "w").write("5")
before = peak()
call()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", ["forward", "statistics", "gradient", "topk_codes", "reference"])
def test_peak_memory(call):
    result = subprocess.run([sys.executable, "-c", PEAK, call], capture_output=True, text=True, check=True)
    extra, all_scores = int(result.stdout), 8192 * 4096 * 4
    if call == "reference":
        assert extra > 0.9 * all_scores  # the measurement sees what it should
    else:
        inputs_and_outputs = (8192 * (8 + 8 + 2 * 4) + 2 * 4 * 4096 * 8) * 4
        assert extra < 3 * inputs_and_outputs + 4 * 2**20
        assert extra < all_scores / 10


Z, CODEBOOKS = torch.randn(6, 4), torch.randn(3, 5, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"codebooks": 3}, TypeError, r"codebooks: expected a tensor or a sequence of tensors, got int 3"),
        ({"codebooks": []}, ValueError, r"codebooks: expected at least one level, got none"),
        ({"codebooks": CODEBOOKS[0]}, ValueError, r"codebooks: expected shape \[Q, K, D\] .* got \[5, 4\]"),
        ({"codebooks": CODEBOOKS[:0]}, ValueError, r"codebooks: expected .* at least one level, got \[0, 5, 4\]"),
        ({"codebooks": CODEBOOKS.long()}, TypeError, r"codebooks: expected a tensor of float32 .* got int64"),
        ({"codebooks": [CODEBOOKS[0], 1]}, TypeError, r"codebooks\[1\]: expected a tensor .* got int 1"),
        (
            {"codebooks": [CODEBOOKS[0], CODEBOOKS[1, :, :3]]},
            ValueError,
            r"codebooks: expected shape \[K_1, 4\] of level 1 .* level 0 of shape \[5, 4\], got \[5, 3\]",
        ),
        (
            {"codebooks": [CODEBOOKS[0], CODEBOOKS[1].double()]},
            ValueError,
            r"codebooks: expected one dtype and device, got torch.float32 on cpu at level 0 and torch.float64",
        ),
        ({"codebooks": CODEBOOKS[:, :, :3]}, ValueError, r"codebook: expected shape \[5, 4\] to match z"),
        ({"z": torch.randn(6, 4).int()}, TypeError, r"z: expected a tensor of float32"),
        ({"num_levels": 4}, ValueError, r"num_levels: expected an integer from 0 to 3, got 4"),
        ({"num_levels": -1}, ValueError, r"num_levels: expected an integer from 0 to 3, got -1"),
        ({"num_levels": 1.0}, TypeError, r"num_levels: expected None, an integer or a tensor, got float 1.0"),
        ({"num_levels": True}, TypeError, r"num_levels: expected None, an integer or a tensor, got bool True"),
        ({"num_levels": torch.ones(6)}, TypeError, r"num_levels: expected a tensor of int64 or int32, got float32"),
        (
            {"num_levels": torch.ones(5).long()},
            ValueError,
            r"num_levels: expected a shape that is a leading part of \[6\], the shape of the rows, got \[5\]",
        ),
        ({"metric": "l1"}, ValueError, r"metric: expected one of l2, cosine, dot, got 'l1'"),
        ({"gradient": "sigma"}, ValueError, r"gradient: expected one of"),
        ({"commitment_weight": -1}, ValueError, r"commitment_weight: expected a number of at least 0"),
        ({"mask": torch.ones(5).bool()}, ValueError, r"mask: expected shape \[6\]"),
        ({"beam_size": 0}, ValueError, r"beam_size: expected an integer of at least 1, got 0"),
        ({"beam_weights": 1.0}, TypeError, r"beam_weights: expected a sequence of numbers, got float 1.0"),
        ({"beam_weights": [1.0]}, ValueError, r"beam_weights: expected 3 numbers, one a level, got 1"),
        ({"beam_weights": [1, "a", 2]}, TypeError, r"beam_weights\[1\]: expected a number"),
        ({"backend": "cuda"}, ValueError, r"backend: expected None or one of"),
    ],
)
def test_bad_input(arguments, error, message):
    given = {"z": Z, "codebooks": CODEBOOKS} | arguments
    with pytest.raises(error, match=message):
        vqkernels.residual_quantize(given.pop("z"), given.pop("codebooks"), **given)


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": [5, 5]},
        {"sizes": [5, 5, 5, 0]},
        {"sizes": [20, -5]},
        {"sizes": []},
        {"num_levels": torch.ones(1, 6)},
        {"num_levels": torch.ones(1, 5).long()},
        {"indices": torch.full((1, 6, 3), 5)},
        {"indices": torch.zeros(1, 6, 2).long()},
        {"metric": "l1"},
    ],
)
def test_direct_calls_are_refused(change):
    arguments = {
        "z": Z[None],
        "codebooks": CODEBOOKS.reshape(1, 15, 4),
        "sizes": [5, 5, 5],
        "metric": "l2",
        "mask": None,
        "num_levels": None,
        "indices": None,
    }
    torch.ops.vqkernels.residual_quantize(**arguments)
    with pytest.raises(RuntimeError, match=r"vqkernels: .*(sizes|num_levels|indices|metric)"):
        torch.ops.vqkernels.residual_quantize(**(arguments | change))


def test_statistics_refuse_indices_out_of_range():
    arguments = (Z[None], CODEBOOKS.reshape(1, 15, 4), [5, 5, 5])
    with pytest.raises((IndexError, RuntimeError), match="expected values from -1 to 4, got 5"):
        torch.ops.vqkernels.residual_statistics(*arguments, torch.full((1, 6, 3), 5))


def test_given_codes_are_taken():
    """The operation behind the beam search: codes chosen elsewhere, of which the first -1 ends a row."""
    z, codebooks = torch.randn(1, 4, 8), torch.randn(1, 10, 8)
    chosen = torch.tensor([[[2, 3], [-1, 3], [5, -1], [0, 0]]])
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
