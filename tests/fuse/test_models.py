"""The models of other packages, built from their configurations, fused and compared with the originals."""

import copy
import functools
import pickle

import pytest
import torch

import vqkernels
from benchmarks.fuse_models import SUBJECTS
from benchmarks.fuse_truth import Largest, compare_subject, recorded, run
from vqkernels import fuse, unfuse

TRAINED = [name for name in SUBJECTS if not name.endswith(("(quantizer)", "Emu3", "GlmImage"))]


def instances(model):
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


def same(a, b):
    return (
        a.keys() == b.keys()
        and all(a[k].keys() == b[k].keys() for k in a)
        and all(a[k][n] is b[k][n] for k in a for n in a[k])
    )


@pytest.mark.parametrize("name", SUBJECTS)
def test_evaluation(name):
    assert compare_subject(SUBJECTS[name](False), steps=0).ties <= 1


@pytest.mark.parametrize("name", TRAINED)
def test_training(name):
    assert compare_subject(SUBJECTS[name](False), steps=20).ties <= 2


@pytest.mark.parametrize("name", SUBJECTS)
def test_fuse_changes_no_state_and_unfuse_restores(name):
    model = SUBJECTS[name](False).model
    before, state = instances(model), model.state_dict(keep_vars=True)
    expected = {key: value.clone() for key, value in state.items()}
    report = fuse(model, verbose=False)
    assert not same(instances(model), before)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[key] is state[key] and torch.equal(after[key], expected[key]) for key in state)
    assert {m.name for m in report.fused} <= set(dict(model.named_modules()))
    unfuse(model)
    assert same(instances(model), before)


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("steps", [0, 1])
def test_nothing_of_size_rows_by_codes(name, steps):
    subject = SUBJECTS[name](False)
    if steps and name not in TRAINED:
        return
    original = copy.deepcopy(subject.model)
    fuse(subject.model, verbose=False)
    with recorded() as searches:
        run(copy.deepcopy(subject.model), subject, steps)
    with Largest(searches) as largest:
        run(original, subject, steps)
    assert largest.found
    with Largest(searches) as largest:
        run(subject.model, subject, steps)
    assert not largest.found


@pytest.mark.parametrize("name", SUBJECTS)
def test_copy_of_a_fused_model(name):
    subject = SUBJECTS[name](False)
    fuse(subject.model, verbose=False)
    expected = run(subject.model, subject, 0).values
    twin = copy.deepcopy(subject.model)
    for tensor in [*subject.model.parameters(), *subject.model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.fill_(torch.nan)  # what is still bound to the first would see it
    with recorded() as searches:
        assert all(map(torch.equal, run(twin, subject, 0).values, expected))
    assert searches
    unfuse(twin)
    with recorded() as searches:
        run(twin, subject, 0)
    assert not searches


@pytest.mark.parametrize("name", SUBJECTS)
def test_pickles_of_fused_modules(name):
    model = SUBJECTS[name](False).model
    report = fuse(model, verbose=False)
    for fused in report.fused:
        module = model.get_submodule(fused.name)
        twin = pickle.loads(pickle.dumps(module))
        methods = {key: value for key, value in module.__dict__.items() if isinstance(value, functools.partial)}
        assert methods
        assert module.__dict__.keys() == twin.__dict__.keys()
        for key, method in methods.items():
            assert twin.__dict__[key].func is method.func
            assert twin.__dict__[key].args == (twin,)
        unfuse(twin)
        assert not methods.keys() & twin.__dict__.keys()


@pytest.mark.parametrize(
    "name", ["diffusers VQModel", "transformers Encodec", "transformers Chameleon", "transformers Dac"]
)
def test_compiled(name):
    subject = SUBJECTS[name](False)
    fuse(subject.model, verbose=False)
    quantizer = next(m for n, m in subject.model.named_modules() if n.endswith(("quantize", "quantizer")))
    calls = []
    hook = quantizer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    encode = getattr(quantizer, "encode", None)
    run(subject.model, subject, 0)
    hook.remove()
    quantizer.eval()
    if encode is None:
        (args, kwargs), function = calls[0], quantizer
    else:
        args, kwargs, function = (torch.randn(2, 16, 30), 36.0), {}, lambda *a: quantizer.encode(*a)
    with torch.no_grad():
        expected = function(*args, **kwargs)
        results = torch.compile(function, backend="aot_eager", fullgraph=True)(*args, **kwargs)
    flat = torch.utils._pytree.tree_leaves
    assert all(torch.equal(a, b) for a, b in zip(flat(results), flat(expected), strict=True) if a is not None)


def test_compiled_with_graph_breaks():
    subject = SUBJECTS["vector-quantize-pytorch ResidualVQ"](False)
    fuse(subject.model, verbose=False)
    expected = run(subject.model, subject, 0).values
    results = run(torch.compile(subject.model, backend="aot_eager"), subject, 0).values
    assert all(map(torch.equal, results, expected))


def test_compiled_before_it_was_fused():
    subject = SUBJECTS["diffusers VQModel"](False)
    compiled = torch.compile(subject.model, backend="aot_eager")
    run(compiled, subject, 0)
    fuse(subject.model, verbose=False)
    with recorded() as searches:
        run(compiled, subject, 0)
    unfused = len(searches)
    assert unfused
    vqkernels.unfuse(subject.model)
    with recorded() as searches:
        run(compiled, subject, 0)
    assert not searches
