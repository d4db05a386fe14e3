"""What `fuse` and `unfuse` do to any model: what is found, left alone, reported and restored."""

import copy
import functools
import importlib
import importlib.util
import inspect
import linecache
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders import vae
from diffusers.models.autoencoders.vae import VectorQuantizer
from torch import nn
from vector_quantize_pytorch import SimVQ, VectorQuantize

import vqkernels
from vqkernels import fuse, unfuse
from vqkernels.fuse import FusedModule, FusionReport, LeftModule, _recipes

PATH = "diffusers.models.autoencoders.vae.VectorQuantizer"


def quantizer():
    return VectorQuantizer(61, 8, 0.25)


def reason(module):
    report = fuse(module, verbose=False)
    assert not report.fused
    (left,) = report.left
    return left.reason


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_package_is_the_function():
    import vqkernels.fuse as package

    assert vqkernels.fuse is fuse is package
    assert callable(fuse)
    assert package.fuse(nn.Linear(2, 2), verbose=False).fused == ()
    assert vqkernels.unfuse is unfuse is package.unfuse
    assert isinstance(vqkernels.fuse(nn.Linear(2, 2), verbose=False), FusionReport)


def test_import_loads_no_other_library():
    code = (
        "import sys, torch, vqkernels; vqkernels.fuse(torch.nn.Linear(2, 2), verbose=False); "
        "names = {'diffusers', 'transformers', 'vector_quantize_pytorch', 'einops', 'encodec', 'moshi', 'dac'}; "
        "sys.exit(str(names & set(sys.modules)) if names & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("model", [None, torch.zeros(2), VectorQuantizer, "model"])
def test_only_modules(model):
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got "):
            function(model)


@pytest.mark.parametrize("numerics", ["fp16", None, 32])
def test_only_known_numerics(numerics):
    for function in (fuse, vqkernels.fuse.fuse):
        with pytest.raises(ValueError, match=rf'numerics: expected "fp32" or "eager", got {numerics!r}'):
            function(quantizer(), numerics=numerics)


def test_quantizers_serve_both_numerics():
    for numerics in ("fp32", "eager"):
        assert fuse(quantizer(), numerics=numerics, verbose=False).fused


def test_report(capsys):
    class Mine(VectorQuantizer):
        pass

    shared = quantizer()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": Mine(61, 8, 0.25), "d": nn.Linear(2, 2)})
    report = fuse(model)
    assert report.fused == (FusedModule("a", "VectorQuantizer", "diffusers"),)
    assert report.left == (LeftModule("c", "Mine", f"it is a subclass of {PATH}"),)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    for word in ("1 fused, 1 left", "VectorQuantizer", "diffusers", "Mine", "subclass"):
        assert word in printed
    again = fuse(model, verbose=False)
    assert again.fused == ()
    assert [m.reason for m in again.left if m.name == "a"] == ["it is fused already"]
    assert not capsys.readouterr().out
    assert str(fuse(nn.Linear(2, 2), verbose=False)) == "vqkernels.fuse: nothing to fuse found"
    assert "(model)" in str(fuse(quantizer(), verbose=False))


def test_an_unknown_quantizer_is_reported():
    class MyVectorQuantizer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 3)

    model = nn.Sequential(MyVectorQuantizer(), nn.Embedding(4, 3), VectorQuantize(8, 16))
    report = fuse(model, verbose=False)
    assert [m.name for m in report.fused] == ["2"]
    (left,) = report.left
    assert left.name == "0"
    assert "not known" in left.reason


def test_own_layers_are_not_reported():
    report = fuse(vqkernels.nn.VectorQuantize(8, 16), verbose=False)
    assert report.fused == report.left == ()


def test_context_manager_restores_what_it_replaced():
    first, second = quantizer(), quantizer()
    fuse(first, verbose=False)
    model = nn.Sequential(first, second)
    with fuse(model, verbose=False) as report:
        assert [m.name for m in report.fused] == ["1"]
        assert "forward" in second.__dict__
    assert "forward" not in second.__dict__
    assert "forward" in first.__dict__
    with pytest.raises(ZeroDivisionError), fuse(second, verbose=False):
        raise ZeroDivisionError
    assert "forward" not in second.__dict__
    unfuse(model)
    assert "forward" not in first.__dict__


def test_a_subclass_is_left_alone():
    class Mine(VectorQuantizer):
        def forward(self, z):
            return "mine"

    module = Mine(61, 8, 0.25)
    assert reason(module) == f"it is a subclass of {PATH}"
    assert module(torch.randn(1, 8, 2, 2)) == "mine"


def test_a_changed_class_is_left_alone(tmp_path, monkeypatch):
    source = Path(vae.__file__).read_text()
    changed = source.replace("torch.argmin(torch.cdist(", "torch.argmax(torch.cdist(", 1)
    assert changed != source
    (tmp_path / "vae.py").write_text(changed)
    module = load(tmp_path / "vae.py", "diffusers.models.autoencoders.vae")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert "its source differs from diffusers 0.42" in reason(module.VectorQuantizer(61, 8, 0.25))


def test_a_reformatted_class_is_known(tmp_path, monkeypatch):
    source = Path(vae.__file__).read_text()
    begin = source.index("class VectorQuantizer(")
    changed = source[:begin] + source[begin:].replace("        # preserve gradients\n", "\n        # moved\n\n", 1)
    changed = changed.replace("self.n_e = n_e\n", "self.n_e=n_e  # codes\n", 1)
    assert changed != source
    (tmp_path / "vae.py").write_text(changed)
    module = load(tmp_path / "vae.py", "diffusers.models.autoencoders.vae")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert fuse(module.VectorQuantizer(61, 8, 0.25), verbose=False).fused


def test_a_class_without_source_is_left_alone(monkeypatch):
    name = "diffusers.models.autoencoders.vae"
    module = types.ModuleType(name)
    exec("from torch import nn\nclass VectorQuantizer(nn.Module): pass", module.__dict__)
    assert reason(module.VectorQuantizer()) == f"it is not what {PATH} stands for"
    monkeypatch.setitem(sys.modules, name, module)
    assert reason(module.VectorQuantizer()) == "its source cannot be read"


def test_a_patched_class_is_left_alone(monkeypatch):
    monkeypatch.setattr(VectorQuantizer, "forward", lambda self, z: "patched")
    module = quantizer()
    assert reason(module) == "forward() of its class has been replaced"
    assert module(torch.randn(1, 8, 2, 2)) == "patched"


def test_a_class_with_the_method_of_another_is_left_alone(monkeypatch):
    monkeypatch.setattr(VectorQuantizer, "forward", vae.Encoder.forward)
    assert reason(quantizer()) == "forward() of its class has been replaced"


def test_a_patched_helper_is_left_alone(monkeypatch):
    from vector_quantize_pytorch import vector_quantize_pytorch as upstream

    layer = VectorQuantize(8, 16)
    assert fuse(layer, verbose=False).fused
    unfuse(layer)
    monkeypatch.setattr(upstream, "gumbel_sample", lambda logits, **_: (logits.argmin(-1), None))
    assert "gumbel_sample" in reason(layer)


@pytest.mark.parametrize("replacement", [lambda z: "patched", functools.partial(lambda z: "patched")])
def test_a_patched_instance_is_left_alone(replacement):
    module = quantizer()
    module.forward = replacement
    assert reason(module) == "forward() of this module has been replaced"
    unfuse(module)
    assert module(torch.randn(1, 8, 2, 2)) == "patched"


def test_what_has_wrapped_a_method_gets_the_original_back():
    """As accelerate wraps forward, and puts back in the end what it found."""
    layer = VectorQuantize(8, 16).eval()
    x = torch.randn(2, 5, 8)
    expected = layer(x)
    fuse(layer, verbose=False)
    layer._old_forward = layer.forward
    layer.forward = functools.partial(lambda module, *args: module._old_forward(*args), layer)
    unfuse(layer)
    assert layer._old_forward == types.MethodType(VectorQuantize.forward, layer)
    for a, b in zip(layer(x), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [lambda: SimVQ(8, 16), lambda: VectorQuantize(8, 16)])
def test_a_class_that_is_subclassed_after_fuse(make):
    """As fully_shard and parametrizations do: the files of the new class have none of the names of the old one's."""
    original = make()
    fused = copy.deepcopy(original)
    fuse(fused, verbose=False)
    for module in list(fused.modules()):
        module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {"__module__": __name__})
    x = torch.randn(2, 5, 8)
    for a, b in zip(fused(x), original(x), strict=True):
        torch.testing.assert_close(a, b)
    unfuse(fused)
    assert not any(_recipes.bound_names(module) for module in fused.modules())


def test_another_device_is_left_alone():
    class Elsewhere(torch.Tensor):
        device = torch.device("mps")

    module = quantizer()
    module.register_buffer("elsewhere", torch.zeros(1).as_subclass(Elsewhere))
    assert reason(module) == "there are no kernels for mps"


def test_hooks_are_called():
    module = quantizer()
    calls = []
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    module.embedding.register_forward_hook(lambda *_: calls.append("embedding"))
    fuse(module, verbose=False)
    module(torch.randn(1, 8, 2, 2, requires_grad=True))[0].sum().backward()
    assert calls == ["embedding", "forward", "backward"]


def test_methods_come_with_the_arguments_of_the_original():
    for recipe in vqkernels.fuse.RECIPES:
        if recipe.by_shape or recipe.library == "vqkernels" or "higgs" in recipe.class_path:
            continue
        module, _, name = recipe.class_path.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError:
            assert recipe.library not in ("diffusers", "transformers", "vector-quantize-pytorch")
            continue
        assert _recipes.source_hash(cls, recipe.uses) in recipe.sources
        for method, function in recipe.methods.items():
            original = inspect.signature(getattr(cls, method)).parameters
            ours = dict(inspect.signature(function).parameters)
            numerics = ours.pop("numerics", None)
            assert numerics is None or numerics.kind is inspect.Parameter.KEYWORD_ONLY
            assert list(ours) == list(original)
            assert [p.default for p in ours.values()] == [p.default for p in original.values()]


SOURCE = '''
class A:
    """A."""

    def f(self, x):
        """Doubles."""
        if x:
            return f"{x!r:>{len('ab')}} and {{braces}}"
        return 2 * x  # twice
'''


def hash_of(tmp_path, source, name="source_a"):
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    _recipes.source_hash.cache_clear()
    module = load(path, name)
    sys.modules[name] = module
    linecache.checkcache()
    try:
        return _recipes.source_hash(module.A)
    finally:
        del sys.modules[name]


def test_source_hash(tmp_path):
    expected = hash_of(tmp_path, SOURCE)
    same = [
        SOURCE.replace("2 * x  # twice", "2*x"),
        SOURCE.replace('"""Doubles."""', '"""Doubles it."""'),
        SOURCE.replace('    """A."""\n\n', ""),
        SOURCE.replace("    ", "  "),
        SOURCE.replace("return 2 * x", "return 2 \\\n            * x"),
    ]
    different = [
        SOURCE.replace("2 * x", "3 * x"),
        SOURCE.replace("and {{", "or {{"),
        SOURCE.replace("!r", "!s"),
        SOURCE.replace("        return 2 * x", "            return 2 * x"),
        SOURCE.replace("if x:", "if not x:"),
    ]
    for i, source in enumerate(same):
        assert hash_of(tmp_path, source, f"same{i}") == expected, source
    for i, source in enumerate(different):
        assert hash_of(tmp_path, source, f"different{i}") != expected, source
