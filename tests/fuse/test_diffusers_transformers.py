"""Denoising transformers of diffusers, fused and compared with the originals."""

import copy
import pickle

import pytest
import torch
from agreement import Errors
from denoisers import (
    TRANSFORMERS,
    Subject,
    assert_bits_equal,
    assert_within_budget,
    fused_twin,
    kinds,
    run,
    run_exactly,
    subject,
)
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from vqkernels import fuse, unfuse

FUSED = {
    "DiT": {"BasicTransformerBlock": 2, "AdaLayerNormZero": 2, "GELU": 2},
    "PixArt": {"BasicTransformerBlock": 2, "GELU": 2},
    "SD3": {"JointTransformerBlock": 2, "AdaLayerNormZero": 3, "AdaLayerNormContinuous": 2, "GELU": 3},
    "SD3.5": {
        "JointTransformerBlock": 2,
        "SD35AdaLayerNormZeroX": 1,
        "AdaLayerNormZero": 2,
        "AdaLayerNormContinuous": 2,
        "Attention": 3,
        "GELU": 3,
    },
    "Flux": {
        "FluxTransformerBlock": 1,
        "FluxSingleTransformerBlock": 2,
        "AdaLayerNormZero": 2,
        "AdaLayerNormZeroSingle": 2,
        "AdaLayerNormContinuous": 1,
        "FluxAttention": 3,
        "GELU": 2,
    },
    "U-Net": {"BasicTransformerBlock": 4, "GEGLU": 4, "ResnetBlock2D": 8},
}
ROUNDS_OTHERWISE = ("GELU", "GEGLU", "ResnetBlock2D")
BF16_EPS = torch.finfo(torch.bfloat16).eps


class Block(nn.Module):
    """A block that is called as the models are."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *, return_dict, **inputs):
        return (self.block(**inputs),)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_report(name):
    _, report = fused_twin(subject(name), "fp32")
    assert kinds(report.fused) == FUSED[name]
    assert not report.left
    assert {m.library for m in report.fused} == {"diffusers"}
    _, report = fused_twin(subject(name), "eager")
    assert kinds(report.fused) == {k: n for k, n in FUSED[name].items() if k not in ROUNDS_OTHERWISE}
    assert kinds(report.left) == {k: n for k, n in FUSED[name].items() if k in ROUNDS_OTHERWISE}
    assert all('rounds otherwise than the original, which numerics="eager" rules out' in m.reason for m in report.left)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_single_precision_is_within_the_budget(name, train):
    assert_within_budget(name, train=train)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_eager_gives_the_bits_of_the_original(name, dtype):
    made = subject(name)
    made.model.to(dtype).train()
    twin, _ = fused_twin(made, "eager")
    assert_bits_equal(run(twin, dtype), run(made, dtype))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_half_precision_is_within_the_budget(name):
    errors = Errors(BF16_EPS)
    for seed in range(3):
        made = subject(name, seed)
        made.model.bfloat16()
        made = made._replace(inputs={k: v.bfloat16() if v.is_floating_point() else v for k, v in made.inputs.items()})
        twin, _ = fused_twin(made, "fp32")
        errors.add(run(made), run(twin), run_exactly(made))
    errors.check()


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_autocast(name, numerics):
    made = subject(name)
    twin, _ = fused_twin(made, numerics)
    results, expected = run(twin, autocast=True), run(made, autocast=True)
    if numerics == "eager":
        assert_bits_equal(results, expected)
    errors = Errors(BF16_EPS)
    errors.add(expected, results, run_exactly(made))
    errors.check()


def sample(made, scheduler, steps):
    """A few steps of a sampler with guidance by conditions that are swapped within the batch."""
    scheduler.set_timesteps(steps)
    name = next(iter(made.inputs))
    x = made.inputs[name]
    scale = 0.001 if "guidance" in made.inputs else 1
    for t in scheduler.timesteps:
        time = t.expand(len(x)) * scale
        flipped = {k: v.flip(0) if len(v) == len(x) else v for k, v in made.inputs.items()}
        first, second = (
            made.model(**{**given, name: x, "timestep": time}, return_dict=False)[0] for given in (made.inputs, flipped)
        )
        output = (second + 3 * (first - second))[:, : x.shape[1]]
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", ["DiT", "PixArt", "SD3", "SD3.5", "Flux"])
@torch.no_grad()
def test_samplers_end_with_the_same_bits(name):
    made = subject(name)
    made.model.eval()
    make = DDIMScheduler if name in ("DiT", "PixArt") else FlowMatchEulerDiscreteScheduler
    twin, _ = fused_twin(made, "eager")
    expected = sample(made, make(), 5)
    assert not torch.equal(expected, made.inputs[next(iter(made.inputs))])
    assert torch.equal(sample(twin, make(), 5), expected)


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_unfuse_is_exact(name, numerics):
    made = subject(name)
    modules = {path: dict(module.__dict__) for path, module in made.model.named_modules()}
    expected, state = run(made), {k: v.clone() for k, v in made.model.state_dict().items()}
    with fuse(made.model, numerics=numerics, verbose=False) as report:
        assert report.fused
        assert list(made.model.state_dict()) == list(state)
        assert all(torch.equal(v, state[k]) for k, v in made.model.state_dict().items())
    for path, module in made.model.named_modules():
        assert module.__dict__.keys() == modules[path].keys()
        assert all(module.__dict__[k] is v for k, v in modules[path].items())
    assert_bits_equal(run(made), expected)
    fuse(made.model, numerics=numerics, verbose=False)
    unfuse(made.model)
    assert_bits_equal(run(made), expected)


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_copies_and_pickles(name, numerics):
    made = subject(name)
    made.model.eval()
    fuse(made.model, numerics=numerics, verbose=False)
    expected = run(made)
    twins = [copy.deepcopy(made.model), pickle.loads(pickle.dumps(made.model))]
    for parameter in made.model.parameters():
        parameter.data.fill_(torch.nan)  # what is still bound to the first would see it
    for twin in twins:
        assert_bits_equal(run(made._replace(model=twin)), expected)
        assert any("forward" in module.__dict__ for module in twin.modules())
        assert all(
            module.forward.keywords.get("numerics", numerics) == numerics
            for module in twin.modules()
            if "forward" in module.__dict__
        )


@pytest.mark.parametrize(
    ("name", "numerics"), [("DiT", "fp32"), ("DiT", "eager"), ("PixArt", "fp32"), ("SD3.5", "fp32"), ("Flux", "eager")]
)
def test_compiled(name, numerics):
    made = subject(name)
    made.model.eval()
    fuse(made.model, numerics=numerics, verbose=False)
    torch._dynamo.reset()
    compiled = torch.compile(made.model, backend="aot_eager", fullgraph=True)
    assert_bits_equal(run(made, model=compiled), run(made))


def test_compiled_by_inductor():
    block = BasicTransformerBlock(
        24, 2, 12, norm_type="ada_norm_single", norm_elementwise_affine=False, activation_fn="gelu-approximate"
    )
    made = Subject(
        Block(block), {"hidden_states": torch.randn(2, 5, 24), "timestep": torch.randn(2, 144)}, ("hidden_states",)
    )
    twin, _ = fused_twin(made, "fp32")
    torch._dynamo.reset()
    results = [run(made), run(twin, model=torch.compile(twin.model, fullgraph=True))]
    errors = Errors()
    errors.add(*results, run_exactly(made))
    errors.check()


def calls_of(made, paths):
    """The modules of these paths in the order in which they are called; hooks stay for this alone."""
    calls, handles = [], []
    for path in paths:
        module = made.model.get_submodule(path)
        handles.append(module.register_forward_hook(lambda *_, path=path: calls.append(path)))
    run(made)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_hooks_on_any_module_are_called(name, numerics):
    made = subject(name)
    made.model.eval().requires_grad_(False)
    made = made._replace(trained=made.trained[:1])
    twin, _ = fused_twin(made, numerics)
    paths = [path for path, module in made.model.named_modules() if not isinstance(module, nn.ModuleList)]
    expected = calls_of(made, paths)
    for path in set(expected):
        assert calls_of(twin, [path]) == [p for p in expected if p == path], path
    assert calls_of(twin, paths) == expected


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_hooks_that_change_results_are_heeded(name):
    made = subject(name)
    made.model.eval()
    twin, _ = fused_twin(made, "eager")
    for model in (made.model, twin.model):
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.SiLU | nn.GELU | nn.Linear):
                module.register_forward_hook(lambda module, args, output: 1.25 * output)
    assert_bits_equal(run(twin), run(made))


@torch.no_grad()
def test_hooks_on_all_modules_of_a_process_are_called():
    made = subject("DiT")
    twin, _ = fused_twin(made, "fp32")
    counts = []
    for model in (made.model, twin.model):
        calls = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_, calls=calls: calls.append(type(module).__name__)
        )
        try:
            model(**made.inputs)
        finally:
            handle.remove()
        counts.append(calls)
    assert counts[0] == counts[1]


class Adapter(nn.Module):
    """A linear layer with an adaptation of low rank, as peft wraps one."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_wrapped_linear_layers(name, numerics):
    errors = Errors()
    for seed in range(3):
        made = subject(name, seed)
        twin, _ = fused_twin(made, numerics)
        for model in (made.model, twin.model):
            torch.manual_seed(seed)
            for module in list(model.modules()):
                for child, linear in list(module.named_children()):
                    if type(linear) is nn.Linear and "Adapter" not in type(module).__name__:
                        setattr(module, child, Adapter(linear))
        original, fused = run(made), run(twin)
        if numerics == "eager":
            assert_bits_equal(fused, original)
        errors.add(original, fused, run_exactly(made))
    errors.check()


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("name", ["DiT", "PixArt", "SD3.5", "Flux"])
def test_gradient_checkpointing(name, numerics):
    made = subject(name)
    made.model.train()
    fuse(made.model, numerics=numerics, verbose=False)
    expected = run(made)
    made.model.enable_gradient_checkpointing()
    assert_bits_equal(run(made), expected)


def test_chunked_feed_forward():
    made = subject("SD3.5")
    twin, _ = fused_twin(made, "eager")
    for model in (made.model, twin.model):
        model.enable_forward_chunking(chunk_size=1, dim=0)
    assert_bits_equal(run(twin), run(made))
    assert calls_of(twin, ["transformer_blocks.0.ff"]) == ["transformer_blocks.0.ff"] * 2


def test_chunked_feed_forward_of_a_basic_block():
    made = subject("DiT")
    twin, _ = fused_twin(made, "eager")
    for model in (made.model, twin.model):
        for block in model.transformer_blocks:
            block.set_chunk_feed_forward(8, 1)
    assert_bits_equal(run(twin), run(made))
    assert calls_of(twin, ["transformer_blocks.0.ff"]) == ["transformer_blocks.0.ff"] * 2


@pytest.mark.parametrize("name", ["DiT", "SD3", "SD3.5", "Flux"])
def test_conditions_that_are_broadcast(name):
    """One time, label and pooled prompt for a batch of several images."""
    made = subject(name)
    several = ("hidden_states", "encoder_hidden_states", "img_ids", "txt_ids")
    made = made._replace(inputs={k: v if k in several else v[:1] for k, v in made.inputs.items()})
    expected = run(made)
    twin, _ = fused_twin(made, "eager")
    assert_bits_equal(run(twin), expected)
    errors = Errors()
    twin, _ = fused_twin(made, "fp32")
    errors.add(expected, run(twin), run_exactly(made))
    errors.check()
