"""Processors, options and single blocks of the transformers of diffusers, fused."""

import copy
import inspect

import pytest
import torch
from agreement import Errors
from denoisers import (
    assert_bits_equal,
    fused_twin,
    kinds,
    run,
    sd3,
    subject,
)
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import AttnProcessor, FusedJointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor, FluxPosEmbed
from torch import nn

from vqkernels import fuse
from vqkernels.fuse import _blocks, _recipes


def test_a_processor_that_is_set_afterwards():
    torch.manual_seed(0)
    made = sd3(qk_norm="rms_norm")
    twin, report = fused_twin(made, "eager")
    assert "Attention" in kinds(report.fused)
    for model in (made.model, twin.model):
        model.fuse_qkv_projections()
        assert isinstance(model.transformer_blocks[0].attn.processor, FusedJointAttnProcessor2_0)
    assert_bits_equal(run(twin), run(made))


def test_another_processor_is_reported():
    made = subject("SD3.5")
    made.model.fuse_qkv_projections()
    report = fuse(made.model, verbose=False)
    assert {m.reason for m in report.left} == {"its processor is FusedJointAttnProcessor2_0"}
    assert kinds(report.left) == {"Attention": 3}
    made = subject("PixArt")
    made.model.set_attn_processor(AttnProcessor())
    assert not fuse(made.model, verbose=False).left  # there is nothing to fuse in its attention


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_flux_with_one_projection(numerics):
    made = subject("Flux")
    twin, _ = fused_twin(made, numerics)
    for model in (made.model, twin.model):
        model.fuse_qkv_projections()
        assert model.transformer_blocks[0].attn.fused_projections
    if numerics == "eager":
        assert_bits_equal(run(twin), run(made))
    torch.testing.assert_close(run(twin), run(made), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_flux_keeps_its_attention_backend(monkeypatch):
    made = subject("Flux")
    fuse(made.model, verbose=False)
    asked = []
    dispatch = transformer_flux.dispatch_attention_fn

    def record(*args, backend, parallel_config, **kwargs):
        asked.append((backend, parallel_config))
        return dispatch(*args, **kwargs)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", record)
    for attn in (b.attn for b in [*made.model.transformer_blocks, *made.model.single_transformer_blocks]):
        attn.set_attention_backend("_native_math")
        attn.processor._parallel_config = "config"
    made.model(**made.inputs)
    assert asked == [("_native_math", "config")] * 3


@torch.no_grad()
def test_flux_with_an_image_prompt():
    made = subject("Flux")
    twin, _ = fused_twin(made, "eager")
    results = []
    for model in (made.model, twin.model):
        torch.manual_seed(0)
        processor = FluxIPAdapterAttnProcessor(48, 20)
        model.transformer_blocks[0].attn.set_processor(processor)
        arguments = {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(2, 3, 20)]}}
        results.append(model(**made.inputs, **arguments, return_dict=False)[0])
    assert torch.equal(*results)
    report = fuse(copy.deepcopy(made.model), verbose=False)
    assert [m.reason for m in report.left] == ["its processor is FluxIPAdapterAttnProcessor"]


def test_flux_with_a_mask_and_without_rotation():
    made = subject("Flux")
    twin, _ = fused_twin(made, "eager")
    x, context = torch.randn(2, 6, 48), torch.randn(2, 3, 48)
    mask = torch.rand(2, 1, 9, 9) > 0.3
    for index in (0, 1):
        results = []
        for model in (made.model, twin.model):
            attn = [*model.transformer_blocks, *model.single_transformer_blocks][index].attn
            arguments = {"encoder_hidden_states": context} if index == 0 else {}
            keys = mask if index == 0 else mask[..., :6, :6]
            results.append(attn(x, attention_mask=keys, **arguments))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
@torch.no_grad()
def test_half_precision_is_clipped(kind):
    """What overflows float16 where the last branch joins the stream becomes its largest number."""
    block = getattr(subject("Flux").model, kind)[0].half()
    x, context = torch.randn(2, 6, 48).half(), torch.randn(2, 3, 48).half()
    context[0, 0, :8], context[1, 2, :8] = 65504, -65504
    norm = block.norm1_context if kind == "transformer_blocks" else block.norm
    norm.linear.weight.zero_()
    norm.linear.bias.zero_()
    norm.linear.bias[-48:] = 1000  # the gate of the last branch
    temb = torch.randn(2, 48).half()
    expected = block(x, context, temb)
    with fuse(block, verbose=False) as report:
        assert block.__dict__["forward"] is not None
        assert report.fused
        results = block(x, context, temb)
    clipped = expected[0].abs() == 65504
    assert 2 <= clipped.sum() < clipped.numel()
    assert torch.equal(results[0][clipped], expected[0][clipped])
    for a, b in zip(results, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-2, atol=10)


def test_refused_blocks():
    for arguments, reason in [
        ({"norm_type": "ada_norm", "num_embeds_ada_norm": 4}, "its norm_type is ada_norm"),
        ({"norm_type": "layer_norm_i2vgen"}, "its norm_type is layer_norm_i2vgen"),
    ]:
        report = fuse(BasicTransformerBlock(8, 2, 4, activation_fn="gelu-approximate", **arguments), verbose=False)
        assert [(m.name, m.reason) for m in report.left] == [("", reason)]
        assert [m.name for m in report.fused] == ["ff.net.0"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 4, "cross_attention_dim": 6},
        {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 4, "norm_elementwise_affine": True},
        {"norm_type": "ada_norm_single"},
        {"norm_type": "ada_norm_single", "cross_attention_dim": 6, "positional_embeddings": "sinusoidal"},
        {"cross_attention_dim": 6, "positional_embeddings": "sinusoidal"},
        {"cross_attention_dim": 6, "only_cross_attention": True},
        {"double_self_attention": True},
        {"cross_attention_dim": 6, "attention_type": "gated"},
        {},
    ],
)
def test_options_of_the_basic_block(arguments):
    torch.manual_seed(0)
    if "positional_embeddings" in arguments:
        arguments = {**arguments, "num_positional_embeddings": 5}
    block = BasicTransformerBlock(8, 2, 4, final_dropout=True, **arguments)
    inputs = {
        "hidden_states": torch.randn(2, 5, 8),
        "encoder_hidden_states": torch.randn(2, 3, 6) if "cross_attention_dim" in arguments else None,
        "timestep": torch.randn(2, 48) if arguments.get("norm_type") == "ada_norm_single" else torch.tensor([1, 3]),
        "class_labels": torch.tensor([0, 2]),
    }
    calls = [inputs]
    if arguments.get("attention_type") == "gated":
        calls.append({**inputs, "cross_attention_kwargs": {"gligen": {"objs": torch.randn(2, 4, 6)}}})
    for numerics in ("fp32", "eager"):
        fused = copy.deepcopy(block)
        assert fuse(fused, numerics=numerics, verbose=False).fused[0].kind == "BasicTransformerBlock"
        for given in calls:
            torch.manual_seed(0)
            expected = block(**given)
            torch.manual_seed(0)
            result = fused(**given)
            if numerics == "eager":
                assert torch.equal(result, expected)
            torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("activation", ["gelu", "gelu-approximate", "geglu", "swiglu", "geglu-approximate"])
@pytest.mark.parametrize("bias", [False, True])
def test_activations(activation, bias):
    errors = Errors()
    torch.manual_seed(0)
    module = FeedForward(24, activation_fn=activation, bias=bias)
    fused, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    assert bool(fuse(fused, verbose=False).fused) == (activation != "geglu-approximate")
    for _ in range(3):
        x = torch.randn(2, 7, 24)
        results = []
        for m in (module, fused, exact):
            z = x.to(next(m.parameters()).dtype).requires_grad_()
            y = m(z)
            gradients = torch.autograd.grad(y.square().sum(), [z, *m.parameters()])
            results.append({str(i): t.detach() for i, t in enumerate([y, *gradients])})
        errors.add(*results)
    errors.check()


@pytest.mark.parametrize("activation", ["gelu", "geglu", "swiglu"])
@torch.no_grad()
def test_activations_of_tensor_subclasses(activation):
    """They are the original's, with its bias."""

    class Elsewhere(torch.Tensor):
        pass

    module = FeedForward(8, activation_fn=activation)
    fused = copy.deepcopy(module)
    assert fuse(fused, verbose=False).fused
    x = torch.randn(2, 3, 8).as_subclass(Elsewhere)
    assert torch.equal(fused(x), module(x))


def test_a_norm_of_another_kind_is_called():
    """AdaLayerNormContinuous has a norm by the root mean square, AdaLayerNormZero one that always is in float32."""
    torch.manual_seed(0)
    for module, arguments in [
        (AdaLayerNormContinuous(8, 6, norm_type="rms_norm"), (torch.randn(2, 6),)),
        (AdaLayerNormZero(8, norm_type="fp32_layer_norm"), (None, None, None, torch.randn(2, 8))),
    ]:
        x = torch.randn(2, 5, 8)
        expected = module(x, *arguments)
        called = []
        module.norm.register_forward_hook(lambda *_, called=called: called.append(1))
        fuse(module, verbose=False)
        result = module(x, *arguments)
        assert called
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_tensor_subclasses_are_left_to_the_original():
    class Elsewhere(torch.Tensor):
        pass

    x = torch.randn(2, 3, 4)
    assert _blocks.takes(x, nn.Parameter(x), None)
    assert not _blocks.takes(x, x.as_subclass(Elsewhere))
    assert not _blocks.takes(x, x.double())
    assert not _blocks.takes(x.long())
    assert not _blocks.takes(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert _blocks.takes(x, x.bfloat16())


@pytest.mark.parametrize("axes", [(16, 56, 56), (4, 6, 6), (8,)])
def test_flux_tables_hold_every_value_twice(axes):
    """The fused attention reads the first of each pair."""
    ids = torch.randint(0, 200, (37, len(axes))).to(torch.bfloat16)
    angles = []
    for size, positions in zip(axes, ids.double().unbind(1), strict=True):
        angles.append(torch.outer(positions, 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)))
    for table, wave in zip(FluxPosEmbed(10000, list(axes))(ids), (torch.cos, torch.sin), strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table[:, ::2], table[:, 1::2])
        torch.testing.assert_close(table[:, ::2].double(), wave(torch.cat(angles, 1)), rtol=0, atol=2**-23)


@pytest.mark.parametrize("name", ["FluxPosEmbed", "get_1d_rotary_pos_embed"])
def test_flux_of_other_tables_is_left(name, monkeypatch):
    """Where diffusers makes the tables otherwise than in the version known, the attention stays as it is."""
    made = subject("Flux")
    source, other = inspect.getsource, getattr(transformer_flux, name)
    monkeypatch.setattr(inspect, "getsource", lambda member: source(member) + "changed = 0\n" * (member is other))
    _recipes.source_hash.cache_clear()
    try:
        report = fuse(made.model, verbose=False)
    finally:
        monkeypatch.undo()
        _recipes.source_hash.cache_clear()
    reasons = {m.reason for m in report.left if m.kind == "FluxAttention"}
    assert reasons == {"its source differs from diffusers 0.42, which this was written for"}


def test_flux_processor_that_is_patched_is_left(monkeypatch):
    made = subject("Flux")
    monkeypatch.setattr(FluxAttnProcessor, "__call__", lambda *args, **kwargs: None)
    report = fuse(made.model, verbose=False)
    assert {(m.kind, m.reason) for m in report.left} == {("FluxAttention", "__call__() of its class has been replaced")}


def test_flux_processor_is_told_by_its_class():
    made = subject("Flux")

    class Mine(FluxAttnProcessor):
        def __call__(self, *args, **kwargs):
            raise ZeroDivisionError

    fuse(made.model, verbose=False)
    made.model.single_transformer_blocks[0].attn.set_processor(Mine())
    with pytest.raises(ZeroDivisionError):
        made.model(**made.inputs)
