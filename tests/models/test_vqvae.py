"""The VQ-VAE: published shapes, shapes through the model, the fused twin beside the reference."""

import copy

import pytest
import torch
import torch.nn.functional as F
from vector_quantize_pytorch import VectorQuantize as UpstreamVectorQuantize

import vqkernels.nn
from vqkernels import reference
from vqkernels.models import VQVAE

SMALL = {"in_channels": 1, "hidden_channels": 16, "residual_channels": 8, "codebook_size": 64, "codebook_dim": 8}


def twins(**options):
    models = [VQVAE(**SMALL, **options, quantizer=q) for q in (reference.VectorQuantize, vqkernels.nn.VectorQuantize)]
    models[1].load_state_dict(models[0].state_dict())
    return models


def test_parameters_have_the_published_shapes():
    # zalandoresearch/pytorch-vq-vae: convolutions in the order of its encoder, pre-quantization layer and decoder.
    residual = [(32, 128, 3, 3), (128, 32, 1, 1)]
    encoder = [(64, 3, 4, 4), (64,), (128, 64, 4, 4), (128,), (128, 128, 3, 3), (128,), *residual, *residual]
    encoder += [(64, 128, 1, 1), (64,)]
    decoder = [(128, 64, 3, 3), (128,), *residual, *residual, (128, 64, 4, 4), (64,), (64, 3, 4, 4), (3,)]
    model = VQVAE()
    assert [tuple(p.shape) for p in model.encoder.parameters()] == encoder
    assert [tuple(p.shape) for p in model.decoder.parameters()] == decoder
    assert model.quantizer.codebook.shape == (512, 64)
    assert model.quantizer._codebook.decay == 0.99
    assert model.quantizer.commitment_weight == 0.25
    assert not model.quantizer.rotation_trick


@pytest.mark.parametrize(("downsamplings", "size"), [(1, (8, 8)), (1, (2, 6)), (2, (12, 8)), (3, (16, 24))])
def test_shapes_through_the_model(downsamplings, size):
    model = VQVAE(**SMALL, downsamplings=downsamplings)
    stride = 2**downsamplings
    map_size = (size[0] // stride, size[1] // stride)
    x = torch.rand(3, 1, *size)
    assert model.encode(x).shape == (3, 8, *map_size)
    assert model.codes(x).shape == (3, *map_size)
    output = model(x)
    assert output.reconstruction.shape == x.shape
    assert output.indices.shape == (3, *map_size)
    assert output.loss.shape == ()
    assert model(x[:0]).reconstruction.shape == (0, 1, *size)


@pytest.mark.parametrize("quantizer", [reference.VectorQuantize, vqkernels.nn.VectorQuantize])
def test_a_forward_pass_is_encode_nearest_code_decode(quantizer):
    model = VQVAE(**SMALL, quantizer=quantizer)
    x = torch.rand(5, 1, 8, 8)
    codebook = model.quantizer.codebook.clone()
    latents = model.encode(x).detach()
    rows = latents.permute(0, 2, 3, 1).double()
    indices = (rows.unsqueeze(-2) - codebook.double()).square().sum(-1).argmin(-1)
    quantized = codebook[indices].permute(0, 3, 1, 2)

    before = copy.deepcopy(model.state_dict())
    assert torch.equal(model.codes(x), indices)
    torch.testing.assert_close(model.reconstruct(x), model.decode(quantized))
    torch.testing.assert_close(model.decode_codes(indices), model.decode(quantized))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed though nothing was trained"

    output = model(x)
    assert torch.equal(output.indices, indices)
    torch.testing.assert_close(output.loss, 0.25 * F.mse_loss(quantized, latents))
    torch.testing.assert_close(output.reconstruction, model.decode(quantized))
    assert not torch.equal(model.quantizer.codebook, codebook)


@pytest.mark.parametrize("downsamplings", [1, 2])
def test_fused_twin_steps_as_the_reference(downsamplings):
    models = twins(downsamplings=downsamplings, threshold_ema_dead_code=1)
    x = torch.rand(16, 1, 16, 16)
    for number in range(3):
        # Rounding differs: only from the same state the same codes have to come out.
        models[1].load_state_dict(models[0].state_dict())
        outputs = []
        for model in models:
            torch.manual_seed(number)
            model.zero_grad()
            outputs.append(model(x))
            (F.mse_loss(outputs[-1].reconstruction, x) + outputs[-1].loss).backward()
        assert torch.equal(outputs[0].indices, outputs[1].indices)
        torch.testing.assert_close(outputs[0].reconstruction, outputs[1].reconstruction)
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
        for (name, expected), actual in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert expected.grad.abs().max() > 0, f"{name} gets no gradient"
            torch.testing.assert_close(actual.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())


def test_gradient_passes_the_codes_straight_through():
    model = VQVAE(**SMALL, commitment_weight=0.0, quantizer=vqkernels.nn.VectorQuantize)
    latents = torch.randn(2, 8, 4, 4, requires_grad=True)
    quantized = model.quantizer(latents)[0]
    weights = torch.randn_like(quantized)
    (quantized * weights).sum().backward()
    torch.testing.assert_close(latents.grad, weights, rtol=0, atol=0)


def test_state_dict_goes_round_the_twins_and_upstream():
    model, fused = twins()
    upstream = VQVAE(**SMALL, quantizer=UpstreamVectorQuantize)
    x = torch.rand(16, 1, 16, 16)
    fused(x)
    model.load_state_dict(fused.state_dict(), strict=True)
    upstream.load_state_dict(model.state_dict(), strict=True)
    fused_again = twins()[1]
    fused_again.load_state_dict(upstream.state_dict(), strict=True)
    for name, value in fused.state_dict().items():
        assert torch.equal(fused_again.state_dict()[name], value), name
    assert torch.equal(fused_again.codes(x), upstream.codes(x))


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (2, 3, 8, 8), r"x: expected images of shape \[B, 1, H, W\], got \[2, 3, 8, 8\]"),
        ("encode", (1, 8, 8), r"x: expected images of shape \[B, 1, H, W\], got \[1, 8, 8\]"),
        ("forward", (2, 1, 8, 10), r"x: expected height and width to be multiples of 4, got \[8, 10\]"),
        ("codes", (2, 1, 9, 8), r"x: expected height and width to be multiples of 4, got \[9, 8\]"),
        ("reconstruct", (2, 1, 0, 8), r"x: expected height and width to be multiples of 4, got \[0, 8\]"),
        ("decode", (2, 16, 2, 2), r"quantized: expected a map of shape \[B, 8, h, w\], got \[2, 16, 2, 2\]"),
        ("decode_codes", (2, 4), r"indices: expected shape \[B, h, w\], got \[2, 4\]"),
    ],
)
def test_bad_shapes_are_named(method, shape, message):
    with pytest.raises(ValueError, match=message):
        getattr(VQVAE(**SMALL), method)(torch.zeros(shape))


@pytest.mark.parametrize("option", ["in_channels", "downsamplings", "codebook_size", "codebook_dim", "hidden_channels"])
def test_bad_sizes_are_named(option):
    with pytest.raises(ValueError, match=rf"{option}: expected at least \d, got 0"):
        VQVAE(**SMALL | {option: 0})
