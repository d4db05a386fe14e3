"""The reference operations against float64 written out here, and the native ones against the reference."""

import pytest
import torch
from vq_cases import DTYPES, KINDS, METRICS, make_inputs

import vqkernels
from vqkernels import reference


def best_codes(z, codebook, metric):
    """Scores in float64, one row at a time, and how far rounding in float32 may move one."""
    z, codebook = z.double(), codebook.double()
    if metric == "cosine":
        codebook = codebook / codebook.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    bias = -codebook.square().sum(1) / 2 if metric == "l2" else torch.zeros(len(codebook), dtype=torch.float64)
    scores = torch.stack([codebook @ row + bias for row in z])
    terms = torch.stack([codebook.abs() @ row.abs() - bias for row in z])
    return scores, terms


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "integers", "duplicates"])
def test_search_against_float64(backend, metric, dtype, kind):
    for rows, codes, dim in [(1, 300, 8), (65, 64, 17), (200, 5, 3), (17, 1, 65)]:
        z, codebook = (x.to(dtype) for x in make_inputs(kind, rows, codes, dim))
        indices, best = vqkernels.nearest_code(z, codebook, metric=metric, return_score=True, backend=backend)
        scores, terms = best_codes(z, codebook, metric)
        unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
        bound = (2 * dim + 8) * unit * terms.amax(1)  # cosine: a norm of dim roundings more
        chosen = scores.gather(1, indices.unsqueeze(1)).squeeze(1)
        slack = torch.finfo(torch.float64).eps * terms.amax(1) * dim
        assert torch.all(scores.amax(1) - chosen <= 2 * bound + slack)
        assert torch.all((best.double() - chosen).abs() <= bound + slack)
        assert best.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_lowest_index(metric):
    """Products of small integers are exact, in any order of summation."""
    z, codebook = make_inputs("integers", 65, 30, 5)
    codebook = codebook[torch.randint(0, 30, (60,))]
    if metric == "cosine":
        codebook = torch.eye(5)[torch.randint(0, 5, (60,))]
    indices = reference.nearest_code(z, codebook, metric=metric)
    scores, _ = best_codes(z, codebook, metric)
    assert torch.equal(indices, (scores == scores.amax(1, keepdim=True)).int().argmax(1))
    assert torch.equal(indices, vqkernels.nearest_code(z, codebook, metric=metric))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
def test_quantizer_against_native(kind, metric, gradient):
    """Both in float64, where ties broken by rounding are rarer than these rows: same choices, equal results."""
    for heads in (None, 2):
        z, codebook = (x.double() for x in make_inputs(kind, 40, 9, 6))
        if kind in ("one_ulp", "duplicates", "integers", "subnormal", "large"):  # no ties but between equal codes
            codebook = codebook + torch.arange(9, dtype=torch.float64).unsqueeze(1) * codebook.abs().amax()
        if heads:
            z, codebook = torch.stack([z, z.flip(0)]), torch.stack([codebook, -codebook])
        mask = torch.rand(z.shape[:-1]) > 0.3
        g = torch.randn_like(z)
        outcomes = []
        for backend in ("native", "reference"):
            inputs = z.clone().requires_grad_(), codebook.clone().requires_grad_()
            options = {"metric": metric, "mask": mask, "gradient": gradient, "codebook_weight": 0.5, "statistics": True}
            result = vqkernels.vector_quantize(*inputs, **options, backend=backend)
            torch.autograd.backward([result.quantized, result.loss], [g, torch.tensor(2.0, dtype=torch.float64)])
            outcomes.append([t.detach() for t in (*result, inputs[0].grad, inputs[1].grad)])
        native, ref = outcomes
        assert torch.equal(native[1], ref[1])
        assert torch.equal(native[3], ref[3])
        for i in (0, 2, 4, 5, 6):
            assert native[i].dtype == ref[i].dtype
            scale = ref[i].nan_to_num().abs().max()
            tolerance = 1e-6 if i == 4 else 1e-11
            torch.testing.assert_close(native[i], ref[i], rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [False, True])
def test_statistics_against_float64(dtype, heads):
    lead = (3,) if heads else ()
    z, indices = torch.randn(*lead, 500, 7).to(dtype), torch.randint(-1, 6, (*lead, 500))
    counts, sums = vqkernels.code_statistics(z, indices, 6, heads=heads, backend="reference")
    one_hot = torch.nn.functional.one_hot(indices + 1, 7)[..., 1:].double()
    assert torch.equal(counts, one_hot.sum(-2).long())
    bound = 501 * 2.0**-24 * (one_hot.mT @ z.double().abs())
    assert torch.all((sums - one_hot.mT @ z.double()).abs() <= bound)
    assert sums.dtype == torch.float32  # as documented, whatever the rows


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("statistics", [False, True])
def test_types_of_results(backend, statistics):
    for z_dtype in DTYPES:
        for codebook_dtype in DTYPES:
            z, codebook = torch.randn(7, 4).to(z_dtype), torch.randn(5, 4).to(codebook_dtype)
            result = vqkernels.vector_quantize(z, codebook, statistics=statistics, backend=backend)
            wide = torch.float64 if torch.float64 in (z_dtype, codebook_dtype) else torch.float32
            assert (result.quantized.dtype, result.indices.dtype, result.loss.dtype) == (z_dtype, torch.int64, wide)
            if statistics:
                assert (result.counts.dtype, result.sums.dtype) == (torch.int64, torch.float32)


def test_broken_rows_and_codes():
    z, codebook = make_inputs("broken", 40, 20, 6)
    for metric in METRICS:
        actual = reference.nearest_code(z, codebook, metric=metric, return_score=True)
        expected = vqkernels.nearest_code(z, codebook, metric=metric, return_score=True)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1] == -torch.inf, expected[0] == -1)
    nothing = reference.nearest_code(torch.ones(3, 2), torch.full((4, 2), torch.nan))
    assert nothing.tolist() == [-1, -1, -1]
    row = reference.vector_quantize(torch.tensor([[torch.nan, 1.0], [1.0, 1.0]]), torch.ones(3, 2))
    assert row[0].isnan().tolist() == [[True, True], [False, False]]
    assert row[2] == 0


def test_indices_out_of_range():
    """As documented for every backend on CPU."""
    for bad in (-2, 5):
        with pytest.raises(IndexError, match="indices"):
            vqkernels.code_statistics(torch.randn(4, 2), torch.tensor([0, 1, bad, 2]), 5, backend="reference")


def test_shapes_and_no_rows():
    codebook = torch.randn(6, 5)
    assert reference.nearest_code(torch.randn(5), codebook).shape == ()
    assert reference.nearest_code(torch.randn(2, 3, 5), codebook).shape == (2, 3)
    assert reference.nearest_code(torch.randn(0, 5), codebook).shape == (0,)
    assert reference.nearest_code(torch.randn(2, 0, 5), torch.randn(2, 6, 5)).shape == (2, 0)
    quantized, indices, loss, counts, sums = reference.vector_quantize(torch.randn(0, 5), codebook, statistics=True)
    assert (quantized.shape, indices.shape, loss.item(), counts.sum().item()) == ((0, 5), (0,), 0.0, 0)
    assert torch.equal(sums, torch.zeros(6, 5))


def test_an_index_out_of_range_counts_for_no_head():
    counts, sums = reference.code_statistics(torch.ones(2, 3, 1), torch.tensor([[0, 5, 0], [0, 0, 0]]), 4, heads=True)
    assert counts.tolist() == [[2, 0, 0, 0], [3, 0, 0, 0]]
    assert sums.squeeze(-1).tolist() == [[2, 0, 0, 0], [3, 0, 0, 0]]
