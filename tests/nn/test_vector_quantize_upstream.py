"""The layer against vector-quantize-pytorch: same state in, same codes, values, gradients and state out."""

import inspect

import pytest
import torch
from vector_quantize_pytorch import VectorQuantize as Upstream
from vq_truth import assert_close, assert_same_state, pair

from vqkernels import nn, reference

OPTIONS = {
    "default": {},
    "straight_through": {"rotation_trick": False},
    "unrouted": {"route_gradients_to_input": False},
    "projected": {"codebook_dim": 5},
    "projected_layernorm": {"codebook_dim": 5, "layernorm_after_project_in": True},
    "shared_heads": {"heads": 2, "codebook_dim": 4},
    "shared_heads_projected": {"heads": 3, "codebook_dim": 4},
    "separate_heads": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "separate_heads_projected": {"heads": 3, "codebook_dim": 5, "separate_codebook_per_head": True},
    "cosine": {"use_cosine_sim": True},
    "cosine_heads": {"use_cosine_sim": True, "heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable_heads": {"learnable_codebook": True, "ema_update": False, "heads": 2, "codebook_dim": 4},
    "frozen": {"freeze_codebook": True},
    "without_ema": {"ema_update": False},
    "manual_ema": {"manual_ema_update": True},
    "slow_ema": {"decay": 0.99, "eps": 1e-3},
    "commitment": {"commitment_weight": 0.25},
    "without_commitment": {"commitment_weight": 0.0},
}


def test_signatures_agree():
    for ours, theirs in (
        (nn.VectorQuantize.__init__, Upstream.__init__),
        (nn.VectorQuantize.forward, Upstream.forward),
    ):
        expected = {name: p.default for name, p in inspect.signature(theirs).parameters.items()}
        actual = {name: p.default for name, p in inspect.signature(ours).parameters.items()}
        assert list(actual)[: len(expected)] == list(expected)
        assert {name: actual[name] for name in expected} == expected
        assert set(actual) - set(expected) <= {"return_statistics", "reproducible"}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_initial_state_from_the_same_seed(options):
    states = []
    for layer in (Upstream, nn.VectorQuantize, reference.VectorQuantize):
        torch.manual_seed(3)
        states.append(layer(8, 32, **options).state_dict())
    for state in states[1:]:
        assert list(state) == list(states[0])
        assert all(torch.equal(state[name], states[0][name]) for name in state)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training_steps_and_evaluation(options):
    upstream, layer = pair(**options)
    optimizers = [torch.optim.SGD([*module.parameters(), torch.zeros(1)], lr=0.01) for module in (upstream, layer)]
    for _ in range(4):
        x, weight = torch.randn(3, 40, 8), torch.randn(3, 40, 8)
        x_upstream, x_layer = x.clone().requires_grad_(), x.clone().requires_grad_()
        quantized, indices, loss, breakdown = layer(x_layer, return_loss_breakdown=True)
        expected, expected_indices, expected_loss, expected_breakdown = upstream(x_upstream, return_loss_breakdown=True)
        assert torch.equal(indices, expected_indices)
        assert_close(quantized, expected)
        assert_close(loss, expected_loss)
        for part, expected_part in zip(breakdown, expected_breakdown, strict=True):
            assert_close(part, expected_part)
        ((quantized * weight).sum() + 3 * loss).backward()
        ((expected * weight).sum() + 3 * expected_loss).backward()
        expected_grad = torch.zeros_like(x) if x_upstream.grad is None else x_upstream.grad
        assert_close(x_layer.grad, expected_grad)
        for ours, theirs in zip(layer.parameters(), upstream.parameters(), strict=True):
            assert_close(ours.grad, torch.zeros_like(theirs) if theirs.grad is None else theirs.grad)
        if options.get("manual_ema_update"):
            layer._codebook.update_ema()
            upstream._codebook.update_ema()
        assert_same_state(layer, upstream)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    layer.eval(), upstream.eval()
    quantized, indices, loss = layer(x)
    expected, expected_indices, expected_loss = upstream(x)
    assert torch.equal(indices, expected_indices)
    assert_close(quantized, expected)
    assert torch.equal(loss, expected_loss)
    assert_same_state(layer, upstream)


LAYOUTS = {
    "sequence": ({}, (3, 20, 8)),
    "token": ({}, (30, 8)),
    "channel_first": ({"channel_last": False}, (3, 8, 20)),
    "channel_first_token": ({"channel_last": False}, (30, 8)),
    "image": ({"accept_image_fmap": True}, (3, 8, 4, 5)),
    "volume": ({"accept_3d_fmap": True}, (2, 8, 2, 3, 5)),
}
HEADS = {"one": {}, "shared": {"heads": 2}, "separate": {"heads": 2, "separate_codebook_per_head": True}}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_layouts(layout, shape, heads, train):
    upstream, layer = pair(**layout, **heads)
    upstream.train(train), layer.train(train)
    x = torch.randn(shape)
    quantized, indices, loss = layer(x)
    expected, expected_indices, expected_loss = upstream(x)
    assert torch.equal(indices, expected_indices)
    assert_close(quantized, expected)
    assert_close(loss, expected_loss)
    assert_same_state(layer, upstream)


@pytest.mark.parametrize("return_zeros", [True, False])
@pytest.mark.parametrize("as_lens", [True, False])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_masks(heads, as_lens, return_zeros):
    # Upstream compares codes of heads with the whole input, which has another shape: no loss there.
    options = {"commitment_weight": 0.0, "codebook_dim": 4} if heads else {}
    upstream, layer = pair(**options, **heads, return_zeros_for_masked_padding=return_zeros)
    x, lens = torch.randn(4, 12, 8), torch.tensor([12, 1, 0, 7])
    mask = {"lens": lens} if as_lens else {"mask": torch.rand(4, 12) < 0.6}
    quantized, indices, loss = layer(x, **mask)
    expected, expected_indices, expected_loss = upstream(x, **mask)
    assert torch.equal(indices, expected_indices)
    assert (indices == -1).any()
    assert_close(quantized, expected)
    assert_close(loss, expected_loss)
    assert_same_state(layer, upstream)


def test_call_options_override_the_layer():
    for options, call in (
        ({}, {"freeze_codebook": True}),
        ({"freeze_codebook": True}, {"freeze_codebook": False}),
        ({}, {"ema_update": False}),
        ({"ema_update": False}, {"ema_update": True}),
    ):
        upstream, layer = pair(**options)
        before = layer.codebook.clone()
        x = torch.randn(3, 40, 8)
        assert torch.equal(layer(x, **call)[1], upstream(x, **call)[1])
        assert_same_state(layer, upstream)
        moved = call.get("ema_update", False) or call.get("freeze_codebook") is False
        assert torch.equal(layer.codebook, before) != moved


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_decoding_and_updates_from_indices(heads):
    upstream, layer = pair(codebook_dim=4, **heads)
    upstream.eval(), layer.eval()
    x = torch.randn(3, 10, 8)
    indices = layer(x)[1]
    assert torch.equal(layer.codebook, upstream.codebook)
    # Upstream keeps shared heads apart here, unlike separate ones and unlike its own forward.
    expected = upstream.get_codes_from_indices(indices).reshape(3, 10, -1)
    assert torch.equal(layer.get_codes_from_indices(indices), expected)
    assert_close(layer.get_output_from_indices(indices), layer.project_out(expected))
    layer.update_indices(x, indices)
    upstream.update_indices(x, indices)
    assert_same_state(layer, upstream)


def test_state_goes_to_upstream_and_is_used_there():
    for options in OPTIONS.values():
        layer, upstream = nn.VectorQuantize(8, 32, **options), Upstream(8, 32, **options)
        layer(torch.randn(3, 40, 8))
        upstream.load_state_dict(layer.state_dict(), strict=True)
        x = torch.randn(3, 40, 8)
        assert torch.equal(upstream.eval()(x)[1], layer.eval()(x)[1])
