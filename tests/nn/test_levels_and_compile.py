"""Layers of levels: random numbers of them drawn on the device, and all steps as one graph of torch.compile."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from vq_upstream import assert_close, flat, step

from vqkernels import nn, reference
from vqkernels.reference import lookup_free

DIM = 8
DROPPING = {"num_quantizers": 5, "quantize_dropout": True}
RESIDUAL = {
    "fsq": (nn.ResidualFSQ, {"levels": [8, 5, 4], "dim": DIM}),
    "lfq": (nn.ResidualLFQ, {"codebook_size": 16, "dim": DIM, "commitment_loss_weight": 0.5}),
    "sim": (nn.ResidualSimVQ, {"codebook_size": 32, "dim": DIM}),
    "sim_reference": (reference.ResidualSimVQ, {"codebook_size": 32, "dim": DIM}),
}
GROUPED = {
    "fsq": (nn.GroupedResidualFSQ, {"levels": [8, 5, 4], "dim": 2 * DIM, "groups": 2}),
    "lfq": (nn.GroupedResidualLFQ, {"codebook_size": 16, "dim": 2 * DIM, "groups": 2}),
}
LAYERS = {
    "fsq": (nn.FSQ, {"levels": [8, 5, 4], "dim": DIM}),
    "fsq_noise": (
        nn.FSQ,
        {"levels": [5] * DIM, "preserve_symmetry": True, "noise_dropout": 0.5, "orthogonal_rotation": True},
    ),
    "lfq": (nn.LFQ, {"codebook_size": 16, "dim": DIM, "commitment_loss_weight": 0.5, "frac_per_sample_entropy": 0.7}),
    "sim": (nn.SimVQ, {"codebook_size": 32, "dim": DIM}),
    **{f"residual_{name}": (kind, {**options, **DROPPING}) for name, (kind, options) in RESIDUAL.items()},
    **{f"grouped_{name}": (kind, {**options, **DROPPING}) for name, (kind, options) in GROUPED.items()},
}

each_residual = pytest.mark.parametrize(("kind", "options"), RESIDUAL.values(), ids=RESIDUAL)
each_layer = pytest.mark.parametrize(("kind", "options"), LAYERS.values(), ids=LAYERS)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def levels_run(indices):
    """The number of levels of indices [..., Q], which has to be the same everywhere, and the first ones."""
    runs = (indices >= 0).flatten(0, -2)
    assert (runs == runs[0]).all()
    num = int(runs[0].sum())
    assert runs[0, :num].all()
    return num


@each_residual
@pytest.mark.parametrize(
    ("cutoff", "multiple", "possible"),
    [(0, 1, {1, 2, 3, 4, 5}), (2, 1, {3, 4, 5}), (0, 2, {2, 4, 5}), (1, 3, {3, 5}), (4, 1, {5})],
)
def test_levels_drawn_on_the_device(kind, options, cutoff, multiple, possible):
    layer = kind(**options, **DROPPING, quantize_dropout_cutoff_index=cutoff, quantize_dropout_multiple_of=multiple)
    x, drawn = torch.randn(2, 7, DIM), {}
    for seed in range(60):
        torch.manual_seed(seed)
        drawn.setdefault(levels_run(layer(x)[1]), seed)
    assert set(drawn) == possible
    for num, seed in drawn.items():
        z = x.clone().requires_grad_()
        torch.manual_seed(seed)
        masked = layer(z, return_all_codes=True)
        fixed = layer(x, return_all_codes=True, num_levels=num)
        for ours, expected in zip(masked, fixed, strict=True):
            assert torch.equal(ours, expected)
        grads = [step(layer, x, num_levels=n)[1] for n in (num, torch.tensor(num))]
        for ours, expected in zip(*grads, strict=True):
            assert torch.equal(ours, expected)
    assert levels_run(layer.eval()(x)[1]) == 5
    assert levels_run(layer(x, num_levels=2)[1]) == 2


@each_residual
def test_draws_are_uniform(kind, options):
    layer = kind(**options, **DROPPING)
    x, counts, num = torch.randn(1, 1, DIM), torch.zeros(6), 400
    for _ in range(num):
        counts[levels_run(layer(x)[1])] += 1
    assert ((counts[1:] - num / 5).abs() <= 5 * (num * 0.2 * 0.8) ** 0.5).all()


@pytest.mark.parametrize("name", ["fsq", "lfq"])
def test_levels_are_not_dropped_without_gradients(name):
    kind, options = RESIDUAL[name]
    layer = kind(**options, **DROPPING)
    with torch.no_grad():
        assert all(levels_run(layer(torch.randn(1, 3, DIM))[1]) == 5 for _ in range(20))


@pytest.mark.parametrize(("kind", "options"), GROUPED.values(), ids=GROUPED)
def test_groups_drop_the_same_levels(kind, options):
    layer = kind(**options, **DROPPING)
    drawn = {levels_run(layer(torch.randn(2, 3, 2 * DIM))[1]) for _ in range(40)}
    assert drawn == {1, 2, 3, 4, 5}


@each_layer
def test_one_graph_equals_eager(kind, options, monkeypatch):
    monkeypatch.setattr(lookup_free, "PAIRS_AT_A_TIME", 512)  # so that rows are quantized in chunks
    eager = kind(**options)
    compiled = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=True, backend=counter)
    for train, graphs in ((True, 1), (True, 0), (False, None), (False, 0)):
        eager.train(train), compiled.train(train)
        x, before = torch.randn(2, 20, eager.dim if hasattr(eager, "dim") else DIM), counter.frame_count
        results = [step(module, x) for module in (eager, run)]
        for ours, expected in zip(results[1][0] + results[1][1], results[0][0] + results[0][1], strict=True):
            assert torch.equal(ours, expected)
        if graphs is not None:  # layers without a mode of evaluation have no other graph for it
            assert counter.frame_count - before == graphs


@each_layer
def test_evaluation_can_be_exported(kind, options):
    layer = kind(**options).eval()
    x = torch.randn(2, 20, layer.dim if hasattr(layer, "dim") else DIM)
    program = torch.export.export(layer, (x,))
    y = torch.randn_like(x)
    for ours, expected in zip(flat(program.module()(y)), flat(layer(y)), strict=True):
        assert torch.equal(ours, expected)


def test_seeds_can_be_compiled():
    kind, options = RESIDUAL["fsq"]
    layer = kind(**options, **DROPPING)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, DIM)
    numbers = []
    for seed in (0, 1, 2, 1):
        indices = run(x, rand_quantize_dropout_fixed_seed=seed)[1]
        assert torch.equal(indices, layer(x, rand_quantize_dropout_fixed_seed=seed)[1])
        numbers.append(levels_run(indices))
    assert len(set(numbers)) > 1


def test_inductor_equals_eager():
    for name in ("fsq", "lfq", "sim"):
        kind, options = RESIDUAL[name]
        layer = kind(**options, num_quantizers=2)
        x = torch.randn(2, 20, DIM)
        results = [step(module, x) for module in (torch.compile(layer, fullgraph=True), layer)]
        (ours, our_grads), (expected, expected_grads) = results
        assert torch.equal(ours[1], expected[1])
        for a, b in zip(ours + our_grads, expected + expected_grads, strict=True):
            # Entropies come from exponentials of numbers of up to 2 * 100 |x|_1, wrong by so many roundings.
            assert_close(a, b, factor=4000 if name == "lfq" else 64)


@each_layer
def test_states_survive_copies(kind, options):
    torch.manual_seed(0)
    layer = kind(**options).eval()
    clone = copy.deepcopy(layer)
    other = kind(**options).eval()
    other.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(2, 20, layer.dim if hasattr(layer, "dim") else DIM)
    expected = flat(layer(x))
    for module in (clone, other):
        assert all(torch.equal(a, b) for a, b in zip(flat(module(x)), expected, strict=True))
