"""The transformer blocks of latent diffusion: the reference beside diffusers' own, the fused one beside it."""

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from twins import assert_fused_within_budget, initialized, kept_bytes, run

import vqkernels.nn
from vqkernels import reference


def twins(numerics="fp32", depth=2, context_dim=20):
    plain = initialized(reference.SpatialTransformer(64, 4, 8, depth, context_dim))
    fused = vqkernels.nn.SpatialTransformer(64, 4, 8, depth, context_dim, numerics=numerics)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def inputs(dtype=torch.float32):
    return torch.randn(2, 64, 5, 3, dtype=dtype), torch.randn(2, 7, 20, dtype=dtype)


def test_reference_is_that_of_diffusers():
    """Names and all: both have those of latent-diffusion."""
    plain = twins()[0].double()
    other = Transformer2DModel(
        4, 8, in_channels=64, num_layers=2, cross_attention_dim=20, activation_fn="geglu"
    ).double()
    other.load_state_dict(plain.state_dict())
    x, context = inputs(torch.float64)
    expected = other(x, encoder_hidden_states=context).sample
    assert (plain(x, context) - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_within_budget(memory_format):
    x, context = inputs()
    assert_fused_within_budget(*twins(), x.to(memory_format=memory_format), context)


def test_without_a_context_it_attends_to_itself():
    assert_fused_within_budget(*twins(context_dim=None), inputs()[0])


def test_eager_is_the_reference_to_the_bit():
    plain, fused = twins("eager")
    arguments = inputs()
    assert all(map(torch.equal, run(fused, *arguments), run(plain, *arguments)))


def test_keeps_less_for_the_backward_pass():
    plain, fused = twins()
    x, context = (t.requires_grad_() for t in inputs())
    halves = 2 * 2 * 15 * 4 * 32 * 4  # of both GEGLUs, the GELU of one half of each token: bytes that are made again
    assert kept_bytes(fused, x, context) <= kept_bytes(plain, x, context) - halves


def test_a_new_one_is_the_identity():
    x, context = inputs()
    assert torch.equal(vqkernels.nn.SpatialTransformer(64, 4, 8, context_dim=20)(x, context), x)


def test_compiles_whole():
    _, fused = twins()
    arguments = inputs()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, *arguments), run(fused, *arguments), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("arguments", "message"), [((64, 0, 8), "num_heads"), ((64, 4, 8, 0), "depth"), ((60, 4, 8), "in_ch")]
)
def test_bad_arguments(arguments, message):
    for layer in (vqkernels.nn.SpatialTransformer, reference.SpatialTransformer):
        with pytest.raises(ValueError, match=f"{message}.*: expected"):
            layer(*arguments)


@pytest.mark.parametrize("layer", [vqkernels.nn.SpatialTransformer, reference.SpatialTransformer])
def test_context_has_to_fit(layer):
    x = torch.randn(1, 32, 2, 2)
    with pytest.raises(ValueError, match="context: expected a context, got NoneType"):
        layer(32, 2, 4, context_dim=5)(x)
    with pytest.raises(ValueError, match="context: expected None without context_dim, got Tensor"):
        layer(32, 2, 4)(x, torch.randn(1, 3, 8))
