"""The package's own models and blocks, fused: a sampler to the bit, training, hooks, compilation, exact unfuse."""

import copy

import pytest
import torch
from twins import assert_fused_within_budget, initialized, kept_bytes, run

import vqkernels
from vqkernels import models, reference
from vqkernels.models import Diffusion, DiT, sample

OPTIONS = {"published": {}, "modern": {"qk_norm": "rms", "mlp": "swiglu", "rope": True}}


def dit(**options):
    return initialized(DiT(8, 2, 3, 48, 3, 4, num_classes=10, **options)).eval()


def inputs(dtype=torch.float32):
    return torch.randn(4, 3, 8, 8, dtype=dtype), torch.randint(1000, (4,)), torch.arange(4)


def fused(model, numerics="fp32"):
    model = copy.deepcopy(model)
    report = vqkernels.fuse(model, numerics=numerics, verbose=False)
    assert report.fused
    return model


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_everything_is_known(options):
    model = dit(**options)
    report = vqkernels.fuse(model, verbose=False)
    kinds = [m.kind for m in report.fused]
    mlp = "SwiGLU" if "mlp" in options else "Mlp"
    assert sorted(kinds) == sorted(["DiT", "FinalLayer", *["DiTBlock", "Attention", mlp] * 3])
    assert not report.left
    assert vqkernels.fuse(dit(**options), numerics="eager", verbose=False).fused[0].kind == "DiT"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_within_budget(options):
    model = dit(**options)
    assert_fused_within_budget(model, fused(model), *inputs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_eager_is_the_original_to_the_bit(options, dtype):
    model = dit(**options).to(dtype)
    arguments = inputs(dtype)
    assert all(map(torch.equal, run(fused(model, "eager"), *arguments), run(model, *arguments)))


@pytest.mark.parametrize("method", ["ddpm", "heun"])
def test_fifty_steps_to_the_bit(method):
    model = dit(qk_norm="rms")
    options = {"method": method, "steps": 50, "y": torch.arange(4), "guidance_scale": 4.0, "clip": 1.0}
    runs = [
        sample(Diffusion(learned_sigma=True), m, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0), **options)
        for m in (model, fused(model, "eager"), fused(model))
    ]
    assert torch.equal(runs[1], runs[0])
    assert runs[0].isfinite().all()
    assert not torch.equal(runs[2], runs[0])  # or this would say nothing


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_training_steps(numerics):
    """A few steps of AdamW with dropped labels: to the bit, or as near as float32 keeps such a run."""
    plain = dit().train()
    other = fused(plain, numerics)
    for model in (plain, other):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        for _ in range(3):
            x0, t, y = inputs()
            optimizer.zero_grad()
            Diffusion(learned_sigma=True).loss(model, x0, t, y).backward()
            optimizer.step()
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) or numerics == "fp32", name
        # Adam moves each element by 1e-4 a step whatever the size of its gradient, the noise around 0 included.
        assert (a - b).abs().max() <= 6.1e-4


def test_hooks_are_heard():
    """A block, norm or modulation that is listened to is called; the others stay fused."""
    model = dit()
    expected = model(*(arguments := inputs()))
    for path in (
        "blocks.1",
        "blocks.1.norm1",
        "blocks.2.adaLN_modulation",
        "final_layer.norm_final",
        "blocks.0.mlp.act",
    ):
        other, heard = fused(model), []
        handle = other.get_submodule(path).register_forward_hook(lambda m, i, o, heard=heard: heard.append(o))
        torch.testing.assert_close(other(*arguments), expected, rtol=1e-4, atol=1e-4)
        assert len(heard) == 1, path
        handle.remove()
        other(*arguments)
        assert len(heard) == 1


def test_a_replaced_block_is_called():
    other = fused(dit())

    class Silent(torch.nn.Module):
        def forward(self, x, c, rope=None):
            return x

    expected = copy.deepcopy(other)
    expected.blocks[1].adaLN_modulation[1].weight.data.zero_()
    expected.blocks[1].adaLN_modulation[1].bias.data.zero_()
    other.blocks[1] = Silent()
    arguments = inputs()
    torch.testing.assert_close(other(*arguments), expected(*arguments), rtol=1e-4, atol=1e-4)


class Adapter(torch.nn.Linear):
    """A linear layer with an adaptation of low rank, which has a weight and a bias as a plain one."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.down, self.up = torch.nn.Linear(base.in_features, 2), torch.nn.Linear(2, base.out_features)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


def adapt(module, name):
    setattr(module, name, Adapter(getattr(module, name)))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: adapt(model.blocks[0].mlp, "fc1"),
        lambda model: setattr(model.blocks[0].mlp, "act", torch.nn.ReLU()),
        lambda model: setattr(model.blocks[1], "norm1", initialized(torch.nn.LayerNorm(48))),
        lambda model: setattr(model.blocks[1], "norm2", torch.nn.RMSNorm(48)),
        lambda model: setattr(model.blocks[2].norm2, "eps", 10.0),
        lambda model: setattr(model.final_layer, "norm_final", torch.nn.RMSNorm(48)),
        lambda model: setattr(model.blocks[0], "adaLN_modulation", torch.nn.Linear(48, 6 * 48)),
        lambda model: model.blocks[1].adaLN_modulation.__setitem__(0, torch.nn.ReLU()),
    ],
    ids=["linear", "activation", "affine norm", "norm", "eps", "last norm", "modulation", "silu"],
)
def test_parts_that_are_replaced_afterwards_count(change):
    plain, arguments = dit(), inputs()
    before = plain(*arguments)
    other = fused(plain)
    for model in (plain, other):
        torch.manual_seed(5)
        change(model)
    assert not torch.allclose(plain(*arguments), before, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(other(*arguments), plain(*arguments), rtol=1e-4, atol=1e-4)


def test_parts_of_other_blocks_that_are_replaced_afterwards_count():
    x, context = torch.randn(2, 64, 5, 3), torch.randn(2, 7, 20)
    plain = initialized(reference.SpatialTransformer(64, 4, 8, 1, 20))
    other = fused(plain)
    for model in (plain, other):
        torch.manual_seed(5)
        adapt(model.transformer_blocks[0].ff.net[0], "proj")
        model.transformer_blocks[0].norm2 = torch.nn.RMSNorm(32)
        model.norm = torch.nn.Identity()
    torch.testing.assert_close(other(x, context), plain(x, context), rtol=1e-4, atol=1e-4)

    plain = initialized(reference.AttnBlock(64))
    other = fused(plain)
    plain.norm, other.norm = torch.nn.Identity(), torch.nn.Identity()
    torch.testing.assert_close(other(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_checkpointing(numerics):
    model = fused(dit(**OPTIONS["modern"]), numerics)
    other = copy.deepcopy(model)
    other.checkpoint_blocks = True
    arguments = inputs()
    assert all(map(torch.equal, run(other, *arguments), run(model, *arguments)))
    assert kept_bytes(other, *arguments) < 0.4 * kept_bytes(model, *arguments)


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_compiles_whole(numerics):
    model, arguments = fused(dit(rope=True), numerics), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, *arguments), run(model, *arguments), strict=True):
        torch.testing.assert_close(actual, expected)


def test_unfuse_restores():
    model, arguments = dit(), inputs()
    before, attributes = run(model, *arguments), {n: set(vars(m)) for n, m in model.named_modules()}
    with vqkernels.fuse(model, verbose=False):
        assert not torch.equal(model(*arguments), before[0])
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert all(map(torch.equal, run(model, *arguments), before))


def test_average_of_a_fused_model():
    model = fused(dit())
    average = models.EMA(model)
    average.update_parameters(model)
    arguments = inputs()
    assert torch.equal(average(*arguments), model(*arguments))
    with torch.no_grad():
        model.final_layer.linear.weight.mul_(2)
    assert not torch.equal(average(*arguments), model(*arguments))


@pytest.mark.parametrize(
    ("block", "arguments"),
    [
        (lambda: reference.AttnBlock(64), [(2, 64, 5, 3)]),
        (lambda: reference.SpatialTransformer(64, 4, 8, 2, 20), [(2, 64, 5, 3), (2, 7, 20)]),
        (lambda: reference.DiTBlock(48, 4, cross_attention_dim=20), [(2, 7, 48), (2, 48)]),
    ],
    ids=["AttnBlock", "SpatialTransformer", "DiTBlock"],
)
def test_blocks(block, arguments):
    model = initialized(block())
    more = {"context": torch.randn(2, 5, 20)} if isinstance(model, reference.DiTBlock) else {}
    drawn = [torch.randn(shape) for shape in arguments]
    assert_fused_within_budget(model, fused(model), *drawn, **more)
    eager = copy.deepcopy(model)
    vqkernels.fuse(eager, numerics="eager", verbose=False)
    assert all(map(torch.equal, run(eager, *drawn, **more), run(model, *drawn, **more)))
