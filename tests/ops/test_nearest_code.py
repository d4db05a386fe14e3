"""The search against exact rationals, an independent emulation and float64, on every instruction set."""

import itertools

import numpy as np
import pytest
import torch
import vq_emulation
import vq_exact
from hypothesis import given
from hypothesis import strategies as st
from vq_cases import CODES, DIMS, DTYPES, KINDS, LEVELS, METRICS, ROWS, cpu_level, make_inputs, same_bits

import vqkernels


def search(z, codebook, **options):
    return vqkernels.nearest_code(z, codebook, return_score=True, **options)


def assert_same(actual, expected):
    assert torch.equal(actual[0], expected[0])
    assert same_bits(actual[1], expected[1])


def emulated(z, codebook, metric):
    indices, scores = vq_emulation.nearest_code(z.float().numpy(), codebook.float().numpy(), metric)
    return torch.from_numpy(indices), torch.from_numpy(scores)


def exact(z, codebook, metric, dtype):
    fmt = vq_exact.FLOAT64 if dtype == torch.float64 else vq_exact.FLOAT32
    indices, scores = vq_exact.nearest_code(z.tolist(), codebook.tolist(), metric, fmt)
    return torch.tensor(indices, dtype=torch.int64), torch.tensor(scores, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_rationals(kind, metric, dtype):
    for seed, (rows, codes, dim) in enumerate([(9, 7, 3), (5, 13, 1), (17, 6, 5), (3, 70, 2), (2, 9, 17)]):
        z, codebook = make_inputs(kind, rows, codes, dim, seed)
        if dtype == torch.float64 and kind == "subnormal":
            z, codebook = z.double() * 1e-140, codebook.double() * 1e-145
        elif dtype == torch.float64 and kind == "large":
            z, codebook = z.double() * 3e134, codebook.double() * 3e134
        elif dtype == torch.float64 and kind == "normal":
            z, codebook = z.double() / 3, codebook.double() / 7
        z, codebook = z.to(dtype), codebook.to(dtype)
        expected = exact(z, codebook, metric, dtype)
        for level in LEVELS:
            with cpu_level(level):
                assert_same(search(z, codebook, metric=metric), expected)


@pytest.mark.parametrize("dim", [1, 2, 5, 16])
def test_fma_of_the_emulation_is_exact(dim):
    """The emulation below is a truth only if its fma is: here it meets the rationals."""
    z, codebook = make_inputs("normal", 20, 20, dim)
    for scale in (1.0, 1e-20, 1e-38, 1e18):
        a, b = z.flatten() * scale, codebook.flatten()
        c = torch.cat([-(a[::2] * b[::2]), a[1::2] * 1e-7])[torch.randperm(len(a))][: len(a)]
        expected = [vq_exact.FLOAT32.fma(*v) for v in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
        actual = vq_emulation.fma32(a.numpy(), b.numpy(), c.numpy())
        assert same_bits(torch.from_numpy(actual), torch.tensor(expected))


SIZES = [
    (ROWS[(i + j + shift) % len(ROWS)], codes, dim)
    for (i, codes), (j, dim), shift in itertools.product(enumerate(CODES), enumerate(DIMS), (0, 5))
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_levels_equal_emulation(kind, metric):
    for seed, (rows, codes, dim) in enumerate(SIZES[KINDS.index(kind) % 4 :: 4]):
        rows = min(rows, 1 + 400_000 // (codes * dim))
        z, codebook = make_inputs(kind, rows, codes, dim, seed)
        expected = emulated(z, codebook, metric)
        for level in LEVELS:
            with cpu_level(level):
                assert_same(search(z, codebook, metric=metric), expected)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("rows", "codes", "dim"), [(1025, 300, 17), (1025, 65, 65), (2100, 64, 8), (15, 4099, 12)])
def test_large_blocks_equal_emulation(level, rows, codes, dim):
    z, codebook = make_inputs("duplicates", rows, codes, dim)
    with cpu_level(level):
        assert_same(search(z, codebook), emulated(z, codebook, "l2"))


@pytest.mark.parametrize("z_dtype", DTYPES)
@pytest.mark.parametrize("codebook_dtype", DTYPES)
def test_dtypes(z_dtype, codebook_dtype):
    wide = torch.float64 in (z_dtype, codebook_dtype)
    for kind, metric, (rows, codes, dim) in itertools.product(
        ("normal", "integers", "broken"), METRICS, [(3, 65, 12), (65, 13, 17), (33, 7, 3), (9, 130, 8)]
    ):
        z, codebook = make_inputs(kind, rows, codes, dim)
        z, codebook = z.to(z_dtype), codebook.to(codebook_dtype)
        if wide:
            expected = exact(z[:4].double(), codebook.double(), metric, torch.float64)
        else:
            expected = emulated(z, codebook, metric)
        results = []
        for level in LEVELS:
            with cpu_level(level):
                results.append(search(z, codebook, metric=metric))
        for result in results:
            assert_same(result, results[0])
        assert_same(tuple(x[: len(expected[0])] for x in results[0]), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("metric", METRICS)
def test_heads_and_mask(level, metric):
    z, codebook = torch.randn(3, 2, 17, 12), torch.randn(3, 35, 12)
    mask = torch.rand(3, 2, 17) > 0.4
    with cpu_level(level):
        indices, scores = search(z, codebook, metric=metric, mask=mask)
        shared_mask = search(z, codebook, metric=metric, mask=mask[0])
    for h in range(3):
        for m, got in ((mask[h], (indices[h], scores[h])), (mask[0], (shared_mask[0][h], shared_mask[1][h]))):
            i, s = emulated(z[h].flatten(0, 1), codebook[h], metric)
            i, s = i.reshape(2, 17).masked_fill(~m, -1), s.reshape(2, 17).masked_fill(~m, -torch.inf)
            assert_same(got, (i, s))


def strided_views(x):
    """The same values [n, d] at other strides and alignments."""
    n, d = x.shape
    padded = torch.full((n, d + 3), torch.nan, dtype=x.dtype)
    padded[:, 1 : d + 1] = x
    yield padded[:, 1 : d + 1]
    yield x.t().contiguous().t()
    every_other = torch.full((2 * n, 2 * d), torch.nan, dtype=x.dtype)
    every_other[::2, ::2] = x
    yield every_other[::2, ::2]
    flat = torch.full((n * d + 1,), torch.nan, dtype=x.dtype)
    flat[1:] = x.flatten()
    yield flat[1:].reshape(n, d)  # contiguous, but aligned to one element only
    raw = torch.zeros((n * d + 1) * x.element_size() + 1, dtype=torch.uint8).numpy()[1:]
    unaligned = np.frombuffer(raw, f"V{x.element_size()}", n * d)
    unaligned.view(np.uint8)[:] = x.contiguous().view(torch.uint8).numpy().ravel()
    yield torch.frombuffer(unaligned, dtype=x.dtype).reshape(n, d)  # not even to that


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignment(level, dtype):
    for rows, codes, dim in [(3, 40, 8), (65, 13, 17), (20, 6, 16)]:
        z, codebook = (x.to(dtype) for x in make_inputs("normal", rows, codes, dim))
        with cpu_level(level):
            expected = search(z, codebook)
            for z_view, codebook_view in zip(strided_views(z), strided_views(codebook), strict=True):
                assert_same(search(z_view, codebook_view), expected)
            row = z[:1].expand(rows, dim)
            one = search(z[:1], codebook)
            assert_same(search(row, codebook), tuple(x.expand(rows).contiguous() for x in one))


@pytest.mark.parametrize("level", LEVELS)
@given(
    rows=st.integers(0, 200),
    codes=st.integers(1, 90),
    dim=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    metric=st.sampled_from(METRICS),
    data=st.data(),
)
def test_any_split_of_the_batch(level, rows, codes, dim, kind, metric, data):
    z, codebook = make_inputs(kind, rows, codes, dim, seed=rows)
    threads = data.draw(st.integers(1, 3))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=6)))
    with cpu_level(level):
        whole = search(z, codebook, metric=metric)
        torch.set_num_threads(threads)
        parts = [search(part, codebook, metric=metric) for part in torch.tensor_split(z, cuts)]
    assert_same(tuple(torch.cat(p) for p in zip(*parts, strict=True)), whole)
    assert_same(whole, emulated(z, codebook, metric))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_and_repeats(level, dtype):
    """The shapes reach whole rows per thread, codes split over threads, and heads."""
    for rows, codes, dim in [(1, 40_000, 8), (3, 20_000, 12), (70, 3000, 17), (2500, 100, 8)]:
        z, codebook = (x.to(dtype) for x in make_inputs("duplicates", rows, codes, dim))
        with cpu_level(level):
            results = []
            for threads in (1, 2, 3, 1, 3):
                torch.set_num_threads(threads)
                results.append(search(z, codebook))
        for result in results[1:]:
            assert_same(result, results[0])


def test_threads_agree_when_subnormals_are_flushed():
    """torch.set_flush_denormal concerns the calling thread alone; the contract knows no such mode."""
    z, codebook = torch.rand(4096, 8) * 1e-20, torch.rand(300, 8) * 1e-20
    expected = search(z, codebook)
    if not torch.set_flush_denormal(True):
        return  # this CPU has no such mode
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert_same(search(z, codebook), expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("rows", "codes", "dim"), [(2000, 512, 64), (512, 2000, 257), (3000, 1024, 8)])
def test_float64_distance(level, rows, codes, dim):
    """The chosen code is the nearest but for rounding: each score is off by at most gamma_(D+1) times its terms."""
    z, codebook = torch.randn(rows, dim), torch.randn(codes, dim)
    with cpu_level(level):
        indices = vqkernels.nearest_code(z, codebook)
    z, codebook = z.double(), codebook.double()
    scores = z @ codebook.T - codebook.square().sum(1) / 2
    terms = z.abs() @ codebook.abs().T + codebook.square().sum(1)
    unit = 2.0**-24
    bound = (dim + 2) * unit / (1 - (dim + 2) * unit) * terms.amax(1)
    chosen = scores.gather(1, indices.unsqueeze(1)).squeeze(1)
    assert torch.all(scores.amax(1) - chosen <= 2 * bound)
    assert (indices != scores.argmax(1)).float().mean() < 1e-2


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e20])
def test_broken_row_touches_no_other(level, bad):
    for rows in (5, 40):
        z, codebook = torch.randn(rows, 12), torch.randn(50, 12)
        expected = search(z, codebook)
        for position in (0, rows // 2, rows - 1):
            broken = z.clone()
            broken[position, 7] = bad
            with cpu_level(level):
                indices, scores = search(broken, codebook)
            assert indices[position] == -1
            assert scores[position] == -torch.inf
            rest = torch.arange(rows) != position
            assert_same((indices[rest], scores[rest]), (expected[0][rest], expected[1][rest]))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_broken_codes_are_never_chosen(level, metric, dtype):
    values = [torch.nan, torch.inf, -torch.inf] + (
        [] if dtype == torch.float16 else [1e160 if dtype.itemsize == 8 else 1e20]
    )
    for rows, bad in itertools.product((3, 40), values):
        z, codebook = torch.randn(rows, 9).to(dtype), torch.randn(20, 9).to(dtype)
        codebook[::2, 4] = bad
        with cpu_level(level):
            indices, scores = search(z, codebook, metric=metric)
            good = search(z, codebook[1::2], metric=metric)
            assert_same((indices, scores), (good[0] * 2 + 1, good[1]))
            codebook[:, 4] = bad
            indices, scores = search(z, codebook, metric=metric)
        assert torch.equal(indices, torch.full((rows,), -1))
        assert torch.all(scores == -torch.inf)


@pytest.mark.parametrize("level", LEVELS)
def test_bound_of_validity(level):
    """A squared norm of exactly MAX / 4 is valid, the next float above is not."""
    edge = torch.tensor([[2.0**63]])  # its square is 2^126, just above MAX / 4
    below = torch.nextafter(edge, torch.zeros(1))
    for rows in (1, 20):
        with cpu_level(level):
            assert torch.equal(vqkernels.nearest_code(edge.expand(rows, 1), below), torch.full((rows,), -1))
            assert torch.equal(
                vqkernels.nearest_code(below.expand(rows, 1), below), torch.zeros(rows, dtype=torch.int64)
            )
            both = torch.cat([edge, below])
            assert torch.equal(vqkernels.nearest_code(below.expand(rows, 1), both), torch.ones(rows, dtype=torch.int64))


@pytest.mark.parametrize("level", LEVELS)
def test_ties_of_signed_zeros(level):
    for rows, (first, second) in itertools.product((1, 30), [(0.0, -0.0), (-0.0, 0.0)]):
        codebook = torch.tensor([[-1.0, 0], [first, 0], [second, 0], [first, 0]])
        z = torch.tensor([[0.5, -0.0]]).expand(rows, 2).contiguous()
        for metric in METRICS:
            with cpu_level(level):
                assert_same(search(z, codebook, metric=metric), exact(z, codebook, metric, torch.float32))
                assert torch.equal(
                    vqkernels.nearest_code(z, codebook, metric=metric), torch.ones(rows, dtype=torch.int64)
                )


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (0, 3, 4)])
def test_no_rows(shape):
    for level, metric in itertools.product(LEVELS, METRICS):
        with cpu_level(level):
            indices, scores = search(torch.empty(shape), torch.randn(5, 4), metric=metric)
        assert indices.shape == scores.shape == shape[:-1]
        assert indices.dtype == torch.int64
    heads = vqkernels.nearest_code(torch.empty(2, 0, 4), torch.randn(2, 5, 4))
    assert heads.shape == (2, 0)


def test_shapes():
    codebook = torch.randn(6, 5)
    assert vqkernels.nearest_code(torch.randn(5), codebook).shape == ()
    assert vqkernels.nearest_code(torch.randn(2, 3, 4, 5), codebook).shape == (2, 3, 4)
    assert vqkernels.nearest_code(torch.randn(2, 5), torch.randn(2, 6, 5)).shape == (2,)


def test_memory_is_poisoned():
    """The binding's outputs come from torch.empty, and the fixture's poison reaches them."""
    z, codebook = torch.randn(5, 4), torch.randn(3, 4)
    with torch.profiler.profile() as profile:
        search(z, codebook)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::fill_"] == calls["aten::new_empty"] == 2
