"""Classes without a package: fused where they do what their library does, left alone where they do anything else."""

import copy
import threading

import lookalikes as like
import pytest
import torch
from agreement import compare, count_ties, leaves, use_fused
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vector_quantize_pytorch import VectorQuantize

from vqkernels import fuse, unfuse
from vqkernels.fuse import _steps, llamagen, rosinality, simvq, taming, titok, zalandoresearch


def image(dim):
    return lambda: torch.randn(4, dim, 6, 5)


def rows(dim):
    return lambda: torch.randn(4, 6, 5, dim)


def clustering(**options):
    """Few codes, far from each other: where unused ones move to the same row, nobody can tell them apart."""
    module = like.TiTok(16, 12, clustering_vq=True, **options)
    nn.init.normal_(module.embedding.weight)
    return module


USED = torch.tensor([3, 40, 5, 17, 60, 21])
MODULES = {
    "taming": (taming.RECIPES[0], lambda: like.Taming(64, 8, 0.25), image(8)),
    "taming_wide": (taming.RECIPES[0], lambda: like.Taming(100, 65, 1), image(65)),
    "taming2": (taming.RECIPES[1], lambda: like.Taming2(64, 8, 0.25), image(8)),
    "taming2_fixed": (taming.RECIPES[1], lambda: like.Taming2(64, 8, 0.25, legacy=False), image(8)),
    "taming2_shaped": (taming.RECIPES[1], lambda: like.Taming2(64, 8, 0.25, sane_index_shape=True), image(8)),
    "taming2_random": (taming.RECIPES[1], lambda: like.Taming2(64, 8, 0.25, used=USED), image(8)),
    "taming2_unknown": (taming.RECIPES[1], lambda: like.Taming2(64, 8, 0.25, used=USED, unknown_index=2), image(8)),
    "zalandoresearch": (zalandoresearch.RECIPES[0], lambda: like.Zalando(64, 8, 0.25), image(8)),
    "zalandoresearch_ema": (zalandoresearch.RECIPES[1], lambda: like.ZalandoEMA(64, 8, 0.25), image(8)),
    "rosinality": (rosinality.RECIPES[0], lambda: like.Rosinality(8, 64), rows(8)),
    "rosinality_one_dim": (rosinality.RECIPES[0], lambda: like.Rosinality(1, 16), rows(1)),
    "llamagen": (llamagen.RECIPES[0], lambda: like.LlamaGen(64, 8, 0.25, 0.0, True, True), image(8)),
    "llamagen_plain": (llamagen.RECIPES[0], lambda: like.LlamaGen(64, 8, 0.25, 0, False, False), image(8)),
    "titok": (titok.RECIPES[0], lambda: like.TiTok(64, 12), image(12)),
    "titok_l2": (titok.RECIPES[0], lambda: like.TiTok(64, 12, use_l2_norm=True), image(12)),
    "titok_clusters": (titok.RECIPES[0], lambda: clustering(use_l2_norm=False), image(12)),
    "titok_l2_clusters": (titok.RECIPES[0], lambda: clustering(use_l2_norm=True), image(12)),
    "simvq": (simvq.RECIPES[0], lambda: like.SimVQ(64, 8), image(8)),
    "simvq_shaped": (simvq.RECIPES[0], lambda: like.SimVQ(64, 8, legacy=False, sane_index_shape=True), image(8)),
}


@pytest.mark.parametrize("synchronised", [True, False], ids=["step_by_step", "on_its_own"])
@pytest.mark.parametrize(("recipe", "make", "inputs"), MODULES.values(), ids=MODULES)
def test_agrees_in_training_and_evaluation(recipe, make, inputs, synchronised):
    original = make()
    compare(original, use_fused(original, recipe), copy.deepcopy(original), inputs, synchronised=synchronised)


@pytest.mark.parametrize(("recipe", "make", "inputs"), MODULES.values(), ids=MODULES)
def test_fuse_keeps_state_and_hooks_and_unfuse_restores(recipe, make, inputs):
    module = make()
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    model = nn.ModuleDict({"quantize": module})
    before = dict(module.__dict__)
    state = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    random = torch.get_rng_state()

    report = fuse(model, verbose=False)
    assert [(m.name, m.kind, m.library) for m in report.fused] == [("quantize", type(module).__name__, recipe.library)]
    assert not report.left
    assert torch.equal(torch.get_rng_state(), random)
    assert not calls
    assert set(module.__dict__) - set(before) == set(recipe.methods)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is value and torch.equal(value, kept) for name, (value, kept) in state.items())
    module(inputs())
    assert len(calls) == 1

    unfuse(model)
    assert list(module.__dict__) == list(before)
    assert all(module.__dict__[name] is value for name, value in before.items() if not name.startswith("_ema"))


@pytest.mark.parametrize("name", ["a tensor with a history", "a lock", "no values"])
def test_what_cannot_be_tried_is_left_alone(name):
    module = like.Taming(61, 8, 0.25)
    if name == "a tensor with a history":
        module.last = module(torch.randn(1, 8, 2, 2, requires_grad=True))[0]
    elif name == "a lock":
        module.lock = threading.Lock()
    else:
        module = module.to("meta")
    report = fuse(nn.Sequential(module, VectorQuantize(8, 16)), verbose=False)
    assert [m.name for m in report.fused] == ["1"]
    (left,) = report.left
    assert left.reason.startswith("it is not taming's: it cannot be tried: ")


@pytest.mark.parametrize(("recipe", "make", "inputs"), MODULES.values(), ids=MODULES)
def test_quantized_alone_moves_no_code(recipe, make, inputs):
    """A parameter whose gradient is zeros, not None, is one that an optimiser decays."""
    original = make()
    for module in (original, use_fused(original, recipe)):
        for x in (inputs(), inputs().requires_grad_()):
            floats = [v for v in leaves(module(x)).values() if isinstance(v, torch.Tensor) and v.numel() == x.numel()]
            (quantized,) = [v for v in floats if v.is_floating_point()]
            assert quantized.requires_grad == x.requires_grad
            if x.requires_grad:
                quantized.sum().backward()
        assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(("recipe", "make", "inputs"), MODULES.values(), ids=MODULES)
def test_other_dtypes_of_results(recipe, make, inputs):
    """A float32 quantizer under autocast, and one that was converted to bfloat16 after it was fused."""
    original = make()
    fused = use_fused(original, recipe)
    compared = 0
    for narrow in (False, True):
        if narrow:
            original, fused = original.bfloat16(), fused.bfloat16()
        x = inputs().bfloat16()
        for training in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not narrow):
                try:
                    expected = leaves(original.train(training)(x))
                except RuntimeError:  # some originals multiply what the other type has
                    continue
                found = leaves(fused.train(training)(x))
            compared += 1
            assert list(found) == list(expected)
            for path, value in expected.items():
                if isinstance(value, torch.Tensor):
                    assert found[path].shape == value.shape, path
                    # Autocast narrows products with one-hot matrices; what takes their place is not narrowed.
                    wider = torch.promote_types(found[path].dtype, value.dtype)
                    assert found[path].dtype == (value.dtype if narrow else wider), path
    assert compared


@pytest.mark.parametrize("name", [name for name in MODULES if name != "taming2_random"])
def test_rows_of_nan(name):
    """They have code 0, as an argmin has it, and leave the other rows and the statistics alone."""
    recipe, make, inputs = MODULES[name]
    module = make()
    clean, fused = use_fused(module, recipe), use_fused(module, recipe)
    x = inputs()
    x[0] = 0
    expected = clean.eval()(x)
    x[0] = torch.nan
    found = fused.eval()(x)
    for path, value in leaves(expected).items():
        other = leaves(found)[path]
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == len(x):
            assert torch.equal(other[1:], value[1:])
    codes = [leaf for leaf in leaves(found).values() if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.int64]
    assert all((indices.reshape(len(x), -1)[0] == indices.reshape(len(x), -1)[0, 0]).all() for indices in codes)
    fused.train()(x)
    state = fused.state_dict()
    untouched = [name for name in state if "cluster" in name or "embed_avg" in name or "ema" in name or name == "embed"]
    assert all(state[name].isfinite().all() for name in untouched)


CODES = {
    "taming": (taming.RECIPES[0], lambda: like.Taming(512, 32, 0.25), lambda out: out[2][2].squeeze(1)),
    "taming2": (taming.RECIPES[1], lambda: like.Taming2(512, 32, 0.25), lambda out: out[2][2]),
    "zalandoresearch": (zalandoresearch.RECIPES[0], lambda: like.Zalando(512, 32, 0.25), lambda out: out[3].argmax(1)),
    "llamagen": (llamagen.RECIPES[0], lambda: like.LlamaGen(512, 32, 0.25, 0.0, True, True), lambda out: out[2][2]),
    "titok": (titok.RECIPES[0], lambda: like.TiTok(512, 32), lambda out: out[1]["min_encoding_indices"].flatten()),
    "simvq": (simvq.RECIPES[0], lambda: like.SimVQ(512, 32), lambda out: out[0][2]),
}


@pytest.mark.parametrize(("recipe", "make", "indices"), CODES.values(), ids=CODES)
def test_codes_of_a_fresh_codebook(recipe, make, indices):
    """Where all codes are near zero, the original's distances are mostly rounding; fused finds the nearer code."""
    original = make().eval()
    fused = use_fused(original, recipe)
    x = 100 * torch.randn(4, 32, 16, 16)
    with torch.no_grad():
        expected, found = indices(original(x)), indices(fused(x))
        codes = original.embedding.weight if hasattr(original, "embedding") else original._embedding.weight
        codes = original.codes() if hasattr(original, "codes") else codes
    rows = x.permute(0, 2, 3, 1).reshape(-1, 32)
    if hasattr(original, "l2_norm"):
        rows, codes = nn.functional.normalize(rows, dim=1), nn.functional.normalize(codes, dim=1)
    count_ties(rows, codes, expected, found)
    distances = torch.cdist(rows.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.argmin(1)
    assert (found != nearest).sum() <= (expected != nearest).sum()


def no_gradient_to_codes(self, rows, quantized):
    return like.mse(quantized.detach(), rows), like.mse(quantized.detach(), rows.detach())


ANYTHING = {
    "argmax": {"choose": lambda self, distances: distances.argmax(1)},
    "normalised": {"normalize": lambda self, x: nn.functional.normalize(x, dim=-1)},
    "inner_product": {"distances": lambda self, rows, codes: -rows @ codes.t()},
    "absolute": {"distances": lambda self, rows, codes: torch.cdist(rows, codes, p=1)},
    "sum": {"losses": lambda self, rows, q: (((q.detach() - rows) ** 2).sum(), ((q - rows.detach()) ** 2).sum())},
    "direct": {"straight_through": lambda self, rows, quantized: quantized},
    "double": {"straight_through": lambda self, rows, quantized: rows + (quantized - rows).detach() * 1.001},
}
CHANGES = {
    "taming": {
        **ANYTHING,
        "other_beta": {"total": lambda self, commitment, codebook: self.beta * commitment + codebook},
        "base_two": {"perplexity": lambda self, encodings: Taming_base_two(encodings)},
        "still_codes": {"losses": no_gradient_to_codes},
        "more_arguments": {"forward": lambda self, z, mask=None: like.Taming.forward(self, z)},
    },
    "taming2": {
        **ANYTHING,
        "other_beta": {"total": lambda self, commitment, codebook: self.beta * commitment + codebook},
        "other_indices": {"choose": lambda self, distances: distances.argmin(1).int()},
        "other_default": {"forward": lambda self, z, temp=1.0, rescale_logits=False, return_logits=False: None},
    },
    "zalandoresearch": {
        **ANYTHING,
        "other_beta": {"total": lambda self, commitment, codebook: commitment + self._commitment_cost * codebook},
    },
    "zalandoresearch_ema": {
        **ANYTHING,
        "unsmoothed": {"smoothed": lambda self, size: size},
        "no_update": {"update": lambda self, rows, encodings: None},
        "codebook_loss": {"total": lambda self, commitment, codebook: codebook + self._commitment_cost * commitment},
    },
    "rosinality": {
        **ANYTHING,
        "no_update": {"update": lambda self, rows, encodings: None},
        "codebook_first": {"update": lambda self, rows, encodings: self.embed.mul_(0.99)},
    },
    "llamagen": {
        **{name: change for name, change in ANYTHING.items() if name not in ("normalised", "inner_product")},
        "unnormalised": {"normalize": lambda self, x: x},
        "no_usage": {"use": lambda self, indices: 0},
        "other_beta": {"losses": lambda self, rows, q: (like.mse(q, rows.detach()), like.mse(q.detach(), rows))},
    },
    "titok_clusters": {
        **ANYTHING,
        "no_clusters": {"recluster": lambda self, indices, distances, latents: None},
        "other_rows": {
            "recluster": lambda self, indices, distances, latents: like.TiTok.recluster(
                self, indices, -distances, latents
            )
        },
    },
    "simvq": {
        **ANYTHING,
        "other_beta": {"total": lambda self, commitment, codebook: self.beta * commitment + codebook},
        "unprojected": {"codes": lambda self: self.embedding.weight},
    },
}


def Taming_base_two(encodings):
    share = encodings.mean(0)
    return 2 ** -torch.sum(share * torch.log(share + 1e-10))


@pytest.mark.parametrize(
    ("name", "change"), [(name, change) for name in CHANGES for change in CHANGES[name]], ids=lambda x: x
)
def test_look_alikes_are_left_alone(name, change):
    recipe, make, _ = MODULES[name]
    model = nn.Sequential(make())
    model[0].__class__ = like.altered(type(model[0]), **CHANGES[name][change])
    before = dict(model[0].__dict__)
    report = fuse(model, verbose=False)
    assert not report.fused
    assert [m.name for m in report.left] == ["0"]
    assert f"it is not {recipe.library}'s" in report.left[0].reason
    assert model[0].__dict__ == before


def test_codes_near_zero_hide_nothing():
    """In the beginning of a training distances are mostly rounding, and other ones choose the same."""
    for change in ({}, ANYTHING["normalised"], ANYTHING["inner_product"]):
        module = like.altered(like.Taming2, **change)(4096, 8, 0.25)
        module.embedding.weight.data *= 1e-3
        expected = "it is not taming's: outputs differ in evaluation" if change else None
        assert taming.RECIPES[1].refuse(module) == expected


@pytest.mark.parametrize("name", ["taming", "taming2"])
@pytest.mark.parametrize("changed", [False, True])
def test_weight_of_a_loss_with_a_frozen_codebook(name, changed):
    """The weight then shows in the gradient of the input alone, beside that of the output, which is far larger."""
    recipe, make, _ = MODULES[name]
    module = make().requires_grad_(False)
    if changed:
        module.__class__ = like.altered(type(module), **CHANGES[name]["other_beta"])
    reason = recipe.refuse(module)
    assert reason == ("it is not taming's: gradients differ in evaluation" if changed else None)


def changed(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def hooked(module):
    module.embedding.register_forward_hook(lambda *_: None)
    return module


LEFT = {
    "dense_entropy": (like.LlamaGen(8, 4, 0.25, 0.1, True, False), "entropy loss is a sum over all rows and codes"),
    "gumbel": (like.GumbelQuantize(4, 4, 8), "draws codes"),
    "ibq": (like.IndexPropagationQuantize(8, 4), "softmax over all codes"),
    "var": (like.VAR(8, 4), "VAR resizes and convolves"),
    "hook": (hooked(like.Taming(8, 4, 0.25)), "embedding is more than a table"),
    "max_norm": (
        changed(like.Taming(8, 4, 0.25), embedding=nn.Embedding(8, 4, max_norm=1.0)),
        "embedding is more than a table",
    ),
    "bfloat16": (like.Taming2(8, 4, 0.25).bfloat16(), "embedding is bfloat16"),
    "missing": (changed(like.SimVQ(8, 4), embedding_proj=nn.Identity()), "embedding_proj is of type Identity"),
    "beta": (changed(like.Taming2(8, 4, 0.25), beta=-1.0), "beta is -1.0"),
    "no_buffer": (changed(like.TiTok(8, 4), clustering_vq=True), "it has no embed_prob"),
    "failing": (changed(like.Taming2(8, 4, 0.25), e_dim=3), "it cannot be tried: "),
}


@pytest.mark.parametrize(("module", "reason"), LEFT.values(), ids=LEFT)
def test_reasons(module, reason):
    report = fuse(module, verbose=False)
    assert not report.fused
    assert [m.kind for m in report.left] == [type(module).__name__]
    assert reason in report.left[0].reason


def test_a_buffer_with_a_history_of_gradients():
    """LlamaGen registers a parameter as a buffer, and a conversion makes it part of a graph, which cannot be copied."""
    module = like.LlamaGen(64, 8, 0.25, 0.0, True, True)
    module.codebook_used = nn.Parameter(torch.zeros(65536)) + 0
    used = module.codebook_used
    assert len(fuse(module, verbose=False).fused) == 1
    assert module.codebook_used is used
    module(torch.randn(2, 8, 4, 4))


def test_calls_that_are_left_to_the_original():
    for module in (like.Taming2(8, 4, 0.25), like.SimVQ(8, 4)):
        fuse(module, verbose=False)
        with pytest.raises(AssertionError, match="no temperature"):
            module(torch.randn(1, 4, 2, 2), temp=0.5)
    module = like.LlamaGen(8, 4, 0.25, 0.0, True, False)
    fuse(module, verbose=False)
    module.entropy_loss_ratio = 0.5
    assert module(torch.randn(1, 4, 2, 2))[1][2] != 0


@pytest.mark.parametrize("name", ["rosinality", "titok_clusters"])
def test_statistics_of_several_processes_are_left_to_the_original(name, monkeypatch):
    recipe, make, inputs = MODULES[name]
    original = make()
    fused = use_fused(original, recipe)
    searches = []
    monkeypatch.setattr(like.Steps, "choose", lambda self, d: searches.append(1) or d.argmin(1))
    fused(inputs())
    assert not searches
    monkeypatch.setattr(_steps, "several_processes", lambda: True)
    fused(inputs())
    assert searches
    searches.clear()
    fused.eval()(inputs())
    assert not searches


SMALL = {
    "taming2": (taming.RECIPES[1], lambda codes: like.Taming2(codes, 8, 0.25)),
    "llamagen": (llamagen.RECIPES[0], lambda codes: like.LlamaGen(codes, 8, 0.25, 0.0, True, False)),
    "simvq": (simvq.RECIPES[0], lambda codes: like.SimVQ(codes, 8)),
    "rosinality": (rosinality.RECIPES[0], lambda codes: like.Rosinality(8, codes)),
    "titok": (titok.RECIPES[0], lambda codes: like.TiTok(codes, 8, clustering_vq=True)),
}


@pytest.mark.parametrize(("recipe", "make"), SMALL.values(), ids=SMALL)
def test_memory_is_not_rows_by_codes(recipe, make):
    """Only libraries that return a one-hot matrix get one."""
    rows, codes = 2 * 12 * 12, 300
    found = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [v for v in leaves(result).values() if isinstance(v, torch.Tensor)]
            found.extend(function for v in tensors if v.numel() >= rows * codes)
            return result

    module = make(codes)
    x = torch.randn(2, 12, 12, 8) if isinstance(module, like.Rosinality) else torch.randn(2, 8, 12, 12)
    for quantizer in (use_fused(module, recipe), module):
        found.clear()
        with Largest():
            outputs = leaves(quantizer(x.requires_grad_())).values()
            sum(v.sum() for v in outputs if isinstance(v, torch.Tensor) and v.requires_grad).backward()
        assert bool(found) == (quantizer is module)
