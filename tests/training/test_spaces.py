"""Pixels and latents: what encoding and decoding keep, and which latents a mask of pixels keeps."""

import pytest
import torch

from vqkernels.models import VQVAE
from vqkernels.training.sampling import DiTSampler, build_model
from vqkernels.training.spaces import Latents, Pixels, load_space


@pytest.fixture
def vqvae():
    return VQVAE(1, 16, residual_channels=8, downsamplings=1, codebook_size=32, codebook_dim=8).eval()


def test_pixels_are_moved_to_both_sides_of_zero(few_digits):
    space = Pixels()
    x = space.encode(few_digits.images)
    assert x.shape[1:] == space.shape
    torch.testing.assert_close(x, (few_digits.images - 0.5) / 0.5)
    torch.testing.assert_close(space.decode(x), few_digits.images)
    assert space.decode(torch.tensor([-3.0, 3.0])).tolist() == [0.0, 1.0]
    assert isinstance(load_space(space.state()), Pixels)


def test_latents_have_mean_zero_and_one_scale(few_digits, vqvae):
    space = Latents.of(vqvae, few_digits.images)
    x = space.encode(few_digits.images)
    assert x.shape == (40, 8, 4, 4)
    assert x.shape[1:] == space.shape
    torch.testing.assert_close(x.double().mean((0, 2, 3)), torch.zeros(8, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.double().square().mean().sqrt().item(), 1.0, rtol=1e-5, atol=0)
    codebook = vqvae.quantizer.codebook
    latents = (x * space.std + space.mean[:, None, None]).movedim(1, -1).reshape(-1, 8)
    nearest = codebook[torch.cdist(latents.double(), codebook.double()).argmin(1)]
    torch.testing.assert_close(latents, nearest)


def test_latents_are_decoded_from_the_nearest_codes(few_digits, vqvae):
    space = Latents.of(vqvae, few_digits.images)
    x = space.encode(few_digits.images)
    moved = x + 1e-4 * torch.randn_like(x)
    assert torch.equal(space.decode(moved), vqvae.reconstruct(few_digits.images).clamp(0, 1))
    loaded = load_space(space.state())
    assert torch.equal(loaded.encode(few_digits.images), x)
    assert torch.equal(loaded.decode(moved), space.decode(moved))


@pytest.mark.parametrize("options", [{"in_channels": 3}, {"dimensions": 1}, {"downsamplings": 4}])
def test_models_of_other_images_are_refused(options):
    vqvae = VQVAE(**{"in_channels": 1, "hidden_channels": 16, "codebook_dim": 8, **options})
    with pytest.raises(ValueError, match=r"latents: expected a VQ-VAE of images \[B, 1, 8, 8\], got one with"):
        Latents(vqvae, torch.zeros(8), torch.ones(()))


def test_a_latent_is_kept_where_all_its_pixels_are(tiny, few_digits, vqvae):
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[0, 3] = mask[6:, 6:] = False
    expected = torch.ones(4, 4, dtype=torch.bool)
    expected[0, 1] = expected[3, 3] = False
    for space, kept in ((Latents.of(vqvae, few_digits.images), expected), (Pixels(), mask)):
        sampler = DiTSampler(tiny(), build_model(tiny(), space), space)
        assert torch.equal(sampler._mask_of_space(mask), kept)
