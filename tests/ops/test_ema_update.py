"""The update against the formula in float64 and against its float32 chain, bit for bit."""

import itertools

import pytest
import torch
import vq_emulation
from hypothesis import given
from hypothesis import strategies as st
from vq_cases import DIMS, LEVELS, cpu_level, same_bits

import vqkernels


def make_state(codes, dim, heads=None):
    lead = () if heads is None else (heads,)
    cluster_size = torch.rand(*lead, codes) * 50
    counts = torch.randint(0, 100, (*lead, codes))
    return (
        torch.randn(*lead, codes, dim),
        cluster_size,
        torch.randn(*lead, codes, dim) * cluster_size.unsqueeze(-1),
        counts,
        torch.randn(*lead, codes, dim) * counts.unsqueeze(-1),
    )


def emulated(state, decay, eps):
    return tuple(torch.from_numpy(x) for x in vq_emulation.ema_update(*(t.numpy() for t in state), decay, eps))


def updated(state, decay, eps, **options):
    state = [t.clone() for t in state]
    vqkernels.ema_update_(*state, decay=decay, eps=eps, **options)
    return tuple(state[:3])


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("decay", "eps"), [(0.99, 1e-5), (0.8, 1e-5), (0.0, 0.0), (1.0, 0.1), (0.5, 0.0)])
def test_levels_equal_emulation(dim, decay, eps):
    for codes in (1, 7, 255, 256, 257, 600):
        state = make_state(codes, dim)
        state[3][::3], state[4][::3] = 0, 0
        expected = emulated(state, decay, eps)
        for level, threads in itertools.product(LEVELS, (1, 3)):
            torch.set_num_threads(threads)
            with cpu_level(level):
                for actual, wanted in zip(updated(state, decay, eps), expected, strict=True):
                    assert same_bits(actual, wanted)


@given(
    codes=st.integers(1, 300),
    dim=st.integers(1, 40),
    decay=st.floats(0, 1),
    eps=st.floats(0, 1),
    level=st.sampled_from(LEVELS),
)
def test_any_shape(codes, dim, decay, eps, level):
    state = make_state(codes, dim)
    with cpu_level(level):
        for actual, wanted in zip(updated(state, decay, eps), emulated(state, decay, eps), strict=True):
            assert same_bits(actual, wanted)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_float64_formula(backend):
    """Errors relative to the terms: one rounding of the difference and one of the sum, a few of the quotient."""
    decay, eps, unit = 0.9, 1e-5, 2.0**-24
    codebook, cluster_size, code_sum, counts, sums = make_state(300, 16)
    new_codebook, new_size, new_sum = updated(
        (codebook, cluster_size, code_sum, counts, sums), decay, eps, backend=backend
    )
    size = decay * cluster_size.double() + (1 - decay) * counts
    total = decay * code_sum.double() + (1 - decay) * sums.double()
    terms = code_sum.double().abs() + sums.double().abs()
    n = size.sum()
    smoothed = ((size + eps) / (n + 300 * eps) * n).unsqueeze(1)
    size_bound = 4 * unit * (cluster_size.double() + counts)
    assert torch.all((new_size - size).abs() <= size_bound)
    assert torch.all((new_sum - total).abs() <= 4 * unit * terms)
    relative = (
        (size_bound / size).unsqueeze(1) + (size_bound.sum() / n) + 300 * unit * (backend == "reference") + 8 * unit
    )
    bound = 4 * unit * terms / smoothed + 2 * relative * (total / smoothed).abs()
    assert torch.all((new_codebook - total / smoothed).abs() <= bound)


def test_heads_are_independent():
    state = make_state(20, 6, heads=3)
    actual = updated(state, 0.9, 1e-5)
    for h in range(3):
        for whole, one in zip(actual, emulated(tuple(t[h] for t in state), 0.9, 1e-5), strict=True):
            assert same_bits(whole[h], one)


@pytest.mark.parametrize("level", LEVELS)
def test_empty_code_stays(level):
    codebook = torch.randn(4, 3)
    state = (codebook, torch.zeros(4), torch.zeros(4, 3), torch.tensor([0, 2, 0, 0]), torch.ones(4, 3))
    with cpu_level(level):
        new_codebook, new_size, _ = updated(state, 0.5, 0.0)
        nothing = updated(
            (codebook, torch.zeros(4), torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), state[4]), 0.5, 0.1
        )
    assert torch.equal(new_codebook[[0, 2, 3]], codebook[[0, 2, 3]])
    assert torch.equal(new_codebook[1], torch.full((3,), 0.5))
    assert new_size.tolist() == [0, 1, 0, 0]
    assert torch.equal(nothing[0], codebook)


@pytest.mark.parametrize("backend", [None, "native", "reference"])
def test_views_are_updated_in_place(backend):
    state = make_state(9, 5)
    expected = updated(state, 0.9, 1e-5, backend=backend)
    wide = torch.full((18, 11), 7.0)
    homes = [wide.clone(), torch.full((9, 3), 7.0), wide.clone()]
    views = [homes[0][::2, 1:11:2], homes[1][:, 1], homes[2][::2, 1:11:2]]
    for view, value in zip(views, state, strict=False):
        view.copy_(value)
    counts, sums = torch.zeros(9, 2, dtype=torch.int64), torch.zeros(5, 9)
    counts[:, 0], sums[:] = state[3], state[4].t()
    vqkernels.ema_update_(*views, counts[:, 0], sums.t(), decay=0.9, eps=1e-5, backend=backend)
    for view, home, wanted in zip(views, homes, expected, strict=True):
        assert same_bits(view.contiguous(), wanted)
        view.fill_(7.0)
        assert torch.all(home == 7.0)  # nothing else was written


@pytest.mark.parametrize("backend", [None, "native", "reference"])
@pytest.mark.parametrize("heads", [None, 2])
def test_version_counters(backend, heads):
    state = make_state(9, 5, heads)
    before = [t._version for t in state]
    vqkernels.ema_update_(*state, decay=0.9, eps=1e-5, backend=backend)
    after = [t._version for t in state]
    assert all(b > a for a, b in zip(before[:3], after[:3], strict=True))
    assert before[3:] == after[3:]
    with torch.inference_mode():
        vqkernels.ema_update_(*state, decay=0.9, eps=1e-5, backend=backend)
    assert all(t._version > a for t, a in zip(state[:3], after[:3], strict=True))


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_autograd_notices_the_change(changed):
    state = make_state(9, 5)
    x = torch.randn_like(state[changed], requires_grad=True)
    product = (x * state[changed]).sum()
    vqkernels.ema_update_(*state, decay=0.9, eps=1e-5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_quantizer_notices_the_change():
    state = make_state(9, 5)
    z = torch.randn(20, 5, requires_grad=True)
    loss = vqkernels.vector_quantize(z, state[0]).loss
    vqkernels.ema_update_(*state, decay=0.9, eps=1e-5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_are_updated():
    state = make_state(9, 5)
    expected = updated(state, 0.9, 1e-5)
    codebook = torch.nn.Parameter(state[0].clone())
    vqkernels.ema_update_(codebook, state[1], state[2], *state[3:], decay=0.9, eps=1e-5)
    assert same_bits(codebook.detach(), expected[0])
    assert codebook.is_leaf


@pytest.mark.parametrize(
    "codebook",
    [torch.zeros(1, 5).expand(9, 5), torch.zeros(25).as_strided((9, 5), (2, 1))],
    ids=["expanded", "strided"],
)
def test_a_target_that_overlaps_itself_is_refused_whole(codebook):
    """Where the update cannot be written, nothing is: the state must not be left half new."""
    _, cluster_size, code_sum, counts, sums = make_state(9, 5)
    before = cluster_size.clone(), code_sum.clone()
    with pytest.raises(ValueError, match="codebook: expected memory of its own"):
        vqkernels.ema_update_(codebook, cluster_size, code_sum, counts, sums, decay=0.9, eps=1e-5)
    assert torch.equal(cluster_size, before[0])
    assert torch.equal(code_sum, before[1])


def test_targets_that_are_one_tensor_are_refused():
    _, cluster_size, code_sum, counts, sums = make_state(9, 5)
    with pytest.raises(ValueError, match="code_sum: expected memory of its own"):
        vqkernels.ema_update_(code_sum, cluster_size, code_sum, counts, sums, decay=0.9, eps=1e-5)
