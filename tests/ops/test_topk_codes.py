"""The k best codes: against exact rationals and an emulation, ties, and what broken rows and codes may do."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
import vq_emulation
import vq_exact
from hypothesis import given
from hypothesis import strategies as st
from vq_cases import CODES, DIMS, DTYPES, KINDS, LEVELS, METRICS, ROWS, cpu_level, make_inputs, same_bits

import vqkernels


def one_by_one(z, codebook, k, metric):
    """By repeated search: the best code is taken out by making it invalid."""
    codes = codebook.expand(len(z), *codebook.shape).clone()
    indices, scores = [], []
    for _ in range(k):
        index, score = vqkernels.nearest_code(z.unsqueeze(1), codes, metric=metric, return_score=True)
        indices.append(index)
        scores.append(score)
        found = index[:, 0] >= 0
        codes[torch.arange(len(z))[found], index[found, 0]] = torch.nan
    if not indices:
        return torch.empty(len(z), 0, dtype=torch.int64), torch.empty(len(z), 0)
    return torch.cat(indices, 1), torch.cat(scores, 1)


def emulated_scores(z, codebook):
    """float32 l2 scores of all codes, each the only one of its codebook."""
    found = [vq_emulation.nearest_code(z.numpy(), code[None].numpy()) for code in codebook]
    return np.stack([np.where(index == 0, score, -np.inf) for index, score in found], 1).astype(np.float32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_equals_repeated_search(metric, kind, level):
    with cpu_level(level):
        for rows, codes, dim, k in [(17, 13, 8, 5), (70, 40, 3, 40), (9, 7, 65, 9)]:
            z, codebook = make_inputs(kind, rows, codes, dim)
            result = vqkernels.topk_codes(z, codebook, k, metric=metric)
            expected = one_by_one(z, codebook, k, metric)
            assert torch.equal(result[0], expected[0])
            assert same_bits(result[1], expected[1])


@pytest.mark.parametrize("dim", DIMS)
def test_equals_emulation(dim):
    z, codebook = make_inputs("duplicates", 40, 30, dim)
    scores = emulated_scores(z, codebook)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :12]
    for level in LEVELS:
        with cpu_level(level):
            indices, found = vqkernels.topk_codes(z, codebook, 12)
            assert torch.equal(indices, torch.from_numpy(order))
            assert same_bits(found, torch.from_numpy(np.take_along_axis(scores, order, 1)))


def test_equals_exact_rationals():
    """Small integers: scores are exact, and many are equal."""
    z, codebook = make_inputs("integers", 30, 25, 5)
    codes = [[Fraction(v) for v in code] for code in codebook.tolist()]
    wanted = []
    for row in z.tolist():
        scores = [sum(Fraction(a) * b for a, b in zip(row, c, strict=True)) - sum(b * b for b in c) / 2 for c in codes]
        wanted.append(sorted(range(25), key=lambda i, scores=scores: (-scores[i], i))[:8])
    for level in LEVELS:
        with cpu_level(level):
            assert vqkernels.topk_codes(z, codebook, 8)[0].tolist() == wanted


@pytest.mark.parametrize("metric", METRICS)
def test_first_code_equals_exact_search(metric):
    z, codebook = make_inputs("one_ulp", 6, 9, 3)
    indices, scores = vq_exact.nearest_code(z.tolist(), codebook.tolist(), metric, vq_exact.FLOAT32)
    found = vqkernels.topk_codes(z, codebook, 3, metric=metric)
    assert found[0][:, 0].tolist() == indices
    assert found[1][:, 0].tolist() == scores


@given(
    rows=st.sampled_from(ROWS),
    codes=st.sampled_from(CODES),
    dim=st.sampled_from((1, 3, 8, 17)),
    k=st.sampled_from((1, 2, 5, 16, 64, 301)),
    kind=st.sampled_from(KINDS),
    metric=st.sampled_from(METRICS),
    dtypes=st.sampled_from(list(itertools.product(DTYPES, DTYPES))),
    threads=st.sampled_from((1, 2, 3)),
)
def test_instruction_sets_agree_with_the_search(rows, codes, dim, k, kind, metric, dtypes, threads):
    z, codebook = make_inputs(kind, rows, codes, dim)
    z, codebook = z.to(dtypes[0]), codebook.to(dtypes[1])
    torch.set_num_threads(threads)
    results = []
    for level in LEVELS:
        with cpu_level(level):
            results.append(vqkernels.topk_codes(z, codebook, k, metric=metric))
            first = vqkernels.nearest_code(z, codebook, metric=metric, return_score=True)
        indices, scores = results[-1]
        assert torch.equal(indices[:, 0], first[0])
        assert same_bits(scores[:, 0], first[1])
        assert same_bits(indices, results[0][0])
        assert same_bits(scores, results[0][1])
    assert torch.equal(indices == -1, scores == -torch.inf)
    later, earlier = scores[:, 1:], scores[:, :-1]
    in_order = (earlier > later) | ((earlier == later) & (indices[:, :-1] < indices[:, 1:])) | (indices[:, 1:] == -1)
    assert in_order.all()
    if codes >= k and kind == "normal":
        assert (indices >= 0).all()


def test_batch_split_threads_and_heads():
    z, codebook = torch.randn(2, 600, 8), torch.randn(2, 50, 8)
    whole = vqkernels.topk_codes(z, codebook, 7)
    for size in (1, 15, 300):
        part = vqkernels.topk_codes(z[:, 100 : 100 + size].clone(), codebook, 7)
        assert torch.equal(part[0], whole[0][:, 100 : 100 + size])
        assert same_bits(part[1], whole[1][:, 100 : 100 + size])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for head in range(2):
            alone = vqkernels.topk_codes(z[head], codebook[head], 7)
            assert torch.equal(alone[0], whole[0][head])
            assert same_bits(alone[1], whole[1][head])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rows_and_codes_without_results(backend):
    z, codebook = torch.randn(2, 3, 4), torch.randn(6, 4)
    z[0, 0], codebook[2], codebook[4] = torch.nan, torch.inf, torch.nan
    mask = torch.tensor([[True, True, False], [True, True, True]])
    indices, scores = vqkernels.topk_codes(z, codebook, 8, mask=mask, backend=backend)
    assert indices.shape == scores.shape == (2, 3, 8)
    assert (indices[0, 0] == -1).all()
    assert (indices[0, 2] == -1).all()
    assert (indices[..., 4:] == -1).all()
    assert torch.equal(indices == -1, scores == -torch.inf)
    assert indices[1, 0, :4].sort().values.tolist() == [0, 1, 3, 5]
    empty = vqkernels.topk_codes(torch.randn(3, 0, 4), codebook, 2, backend=backend)
    assert empty[0].shape == (3, 0, 2)


def test_no_gradient():
    z, codebook = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    assert not any(t.requires_grad for t in vqkernels.topk_codes(z, codebook, 2))


@pytest.mark.slow
def test_compile():
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, c: vqkernels.topk_codes(z, c, 3), backend="aot_eager", fullgraph=True)
    z, codebook = torch.randn(2, 30, 6), torch.randn(9, 6)
    for actual, expected in zip(compiled(z, codebook), vqkernels.topk_codes(z, codebook, 3), strict=True):
        assert same_bits(actual, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, r"k: expected at least 1, got 0"),
        ({"k": 1.5}, TypeError, r"k: expected an integer, got float 1.5"),
        ({"k": True}, TypeError, r"k: expected an integer, got bool True"),
        ({"codebook": torch.randn(5, 3)}, ValueError, r"codebook: expected shape \[5, 4\] to match z"),
        ({"metric": "l1"}, ValueError, r"metric: expected one of"),
        ({"backend": "cuda"}, ValueError, r"backend: expected None or one of"),
    ],
)
def test_bad_input(arguments, error, message):
    given = {"z": torch.randn(6, 4), "codebook": torch.randn(5, 4), "k": 2} | arguments
    with pytest.raises(error, match=message):
        vqkernels.topk_codes(given.pop("z"), given.pop("codebook"), given.pop("k"), **given)


def test_direct_calls_are_refused():
    with pytest.raises(RuntimeError, match="expected k of at least 1"):
        torch.ops.vqkernels.topk_codes(torch.randn(1, 6, 4), torch.randn(1, 5, 4), 0, "l2", None)
