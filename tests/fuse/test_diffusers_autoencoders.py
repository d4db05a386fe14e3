"""Autoencoders of diffusers, fused and compared with the originals."""

import copy
import pickle

import pytest
import torch
from agreement import Errors
from denoisers import (
    AUTOENCODERS,
    assert_bits_equal,
    assert_within_budget,
    fused_twin,
    kinds,
    run,
    run_exactly,
    subject,
)
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vqkernels import fuse, unfuse

SEEDS = range(8)  # deep networks without a residual around their norms: errors vary much from one to the next
FUSED = {"Encoder": 1, "Decoder": 1, "ResnetBlock2D": 10, "Attention": 2}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_report(name):
    quantizer = {"VectorQuantizer": 1} if name == "VQModel" else {}
    _, report = fused_twin(subject(name), "fp32")
    assert kinds(report.fused) == FUSED | quantizer
    assert not report.left
    _, report = fused_twin(subject(name), "eager")
    assert kinds(report.fused) == quantizer
    assert kinds(report.left) == FUSED
    assert all("rounds otherwise than the original" in m.reason for m in report.left)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_single_precision_is_within_the_budget(name, train):
    assert_within_budget(name, SEEDS, train)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_eager_gives_the_bits_of_the_original(name):
    made = subject(name)
    twin, _ = fused_twin(made, "eager")
    assert_bits_equal(run(twin), run(made))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_within_the_budget(autocast):
    errors = Errors(torch.finfo(torch.bfloat16).eps)
    for seed in SEEDS:
        made = subject("AutoencoderKL", seed)
        if not autocast:
            made.model.bfloat16()
            made = made._replace(inputs={k: v.bfloat16() for k, v in made.inputs.items()})
        twin, _ = fused_twin(made, "fp32")
        errors.add(run(made, autocast=autocast), run(twin, autocast=autocast), run_exactly(made))
    errors.check()


def test_channels_last():
    errors = Errors()
    for seed in SEEDS:
        made = subject("AutoencoderKL", seed)
        made.model.to(memory_format=torch.channels_last)
        x = made.inputs["sample"].contiguous(memory_format=torch.channels_last)
        made = made._replace(inputs={"sample": x})
        twin, _ = fused_twin(made, "fp32")
        errors.add(run(made), run(twin), run_exactly(made))
    errors.check()
    strides = []
    for model in (made.model, twin.model):
        model.decoder.conv_out.register_forward_pre_hook(lambda module, args: strides.append(args[0].stride()))
        run(made, model=model)
    assert strides[0] == strides[1]


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_unfuse_is_exact(name):
    made = subject(name)
    modules = {path: dict(module.__dict__) for path, module in made.model.named_modules()}
    expected, keys = run(made), list(made.model.state_dict())
    with fuse(made.model, verbose=False):
        assert list(made.model.state_dict()) == keys
    for path, module in made.model.named_modules():
        assert module.__dict__.keys() == modules[path].keys()
    assert_bits_equal(run(made), expected)
    fuse(made.model, verbose=False)
    unfuse(made.model)
    assert_bits_equal(run(made), expected)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_copies_and_pickles(name):
    made = subject(name)
    fuse(made.model, verbose=False)
    expected = run(made)
    twins = [copy.deepcopy(made.model), pickle.loads(pickle.dumps(made.model))]
    for parameter in made.model.parameters():
        parameter.data.fill_(torch.nan)
    for twin in twins:
        assert_bits_equal(run(made._replace(model=twin)), expected)
        assert twin.encoder.__dict__["forward"].args == (twin.encoder,)


def test_compiled():
    made = subject("AutoencoderKL")
    fuse(made.model, verbose=False)
    torch._dynamo.reset()
    compiled = torch.compile(made.model, backend="aot_eager", fullgraph=True)
    assert_bits_equal(run(made, model=compiled), run(made))


@torch.no_grad()
def test_hooks_on_any_module_are_called():
    made = subject("AutoencoderKL")
    paths = [path for path, module in made.model.named_modules() if not isinstance(module, nn.ModuleList)]
    twin, _ = fused_twin(made, "fp32")

    def calls_of(model, hooked):
        calls, handles = [], []
        for path in hooked:
            hook = model.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.append(path))
            handles.append(hook)
        model(**made.inputs)
        for handle in handles:
            handle.remove()
        return calls

    expected = calls_of(made.model, paths)
    for path in set(expected):
        assert calls_of(twin.model, [path]) == [p for p in expected if p == path], path
    assert calls_of(twin.model, paths) == expected


def test_gradient_checkpointing():
    made = subject("AutoencoderKL")
    made.model.train()
    fuse(made.model, verbose=False)
    expected = run(made)
    made.model.enable_gradient_checkpointing()
    calls = []
    made.model.encoder.mid_block.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_bits_equal(run(made), expected)
    assert len(calls) == 2  # once more in backward


def test_tiles_and_slices():
    errors = Errors()
    for seed in SEEDS:
        made = subject("AutoencoderKL", seed)
        made.model.enable_slicing()
        made.model.enable_tiling()
        made.model.tile_sample_min_size, made.model.tile_latent_min_size = 12, 6
        twin, _ = fused_twin(made, "fp32")
        errors.add(*({"output": r["output.0"]} for r in (run(made), run(twin), run_exactly(made))))
    errors.check()


class Largest(TorchDispatchMode):
    """The most numbers that any tensor has."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_attention_of_an_image_stores_no_matrix_of_its_pixels():
    layer = Attention(8, heads=1, dim_head=8, bias=True, norm_num_groups=4, residual_connection=True)
    x = torch.randn(1, 8, 40, 40, requires_grad=True)
    fuse(layer, verbose=False)
    with Largest() as largest:
        layer(x).sum().backward()
    assert largest.numel < 1600 * 1600


@pytest.mark.parametrize(
    "options",
    [
        {"residual_connection": True, "rescale_output_factor": 1.5, "heads": 2, "dim_head": 4},
        {"residual_connection": False, "heads": 1, "dim_head": 8, "bias": True},
    ],
)
def test_options_of_attention(options):
    torch.manual_seed(0)
    layer = Attention(8, norm_num_groups=2, eps=1e-6, **options)
    fused = copy.deepcopy(layer)
    (module,) = fuse(fused, verbose=False).fused
    assert module.kind == "Attention"
    image, rows = torch.randn(2, 8, 5, 3), torch.randn(2, 7, 8)
    calls = [((image,), {}), ((image,), {"temb": torch.randn(2, 4)}), ((rows,), {}), ((rows, rows[:, :4]), {})]
    calls.append(((image,), {"attention_mask": torch.zeros(2, 1, 15)}))
    for args, kwargs in calls:
        torch.testing.assert_close(fused(*args, **kwargs), layer(*args, **kwargs))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm_num_groups": 2, "processor": AttnProcessor()}, "its processor is AttnProcessor"),
        ({"norm_num_groups": 2, "spatial_norm_dim": 4}, "it has other norms than that of the image"),
        ({"qk_norm": "rms_norm"}, "its processor is AttnProcessor2_0"),
    ],
)
def test_attention_that_is_refused(options, reason):
    report = fuse(Attention(32, heads=2, dim_head=16, **options), verbose=False)
    assert not report.fused
    assert [m.reason for m in report.left] == [reason]


@pytest.mark.parametrize(
    "options",
    [
        {"temb_channels": 5},
        {"temb_channels": 5, "skip_time_act": True, "output_scale_factor": 2.0},
        {"temb_channels": None, "out_channels": 12, "dropout": 0.5},
        {"temb_channels": 5, "time_embedding_norm": "default", "groups_out": 1},
    ],
)
def test_options_of_a_residual_block(options):
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=8, groups=4, **options)
    fused = copy.deepcopy(block)
    assert fuse(fused, verbose=False).fused
    x = torch.randn(2, 8, 6, 6)
    temb = None if options["temb_channels"] is None else torch.randn(2, 5)
    for train in (False, True):
        results = []
        for module in (block, fused):
            torch.manual_seed(0)
            results.append(module.train(train)(x, temb))
        torch.testing.assert_close(*reversed(results))


def test_residual_blocks_that_are_refused():
    for options, reason in [
        ({"up": True}, "it resamples"),
        ({"down": True}, "it resamples"),
        ({"time_embedding_norm": "scale_shift"}, "the time embedding scales what its norm gives"),
        ({"non_linearity": "mish"}, "its activation is Mish"),
    ]:
        block = ResnetBlock2D(in_channels=8, groups=4, temb_channels=5, **options)
        report = fuse(block, verbose=False)
        assert [m.reason for m in report.left] == [reason]


def test_coders_that_are_refused():
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, act_fn="silu")
    model.decoder.conv_act = nn.Mish()
    model.encoder.conv_norm_out = nn.Identity()
    reasons = {m.name: m.reason for m in fuse(model, verbose=False).left}
    assert reasons == {"encoder": "its last norm is Identity", "decoder": "its activation is Mish"}
