"""What VQModel does not show of diffusers' VectorQuantizer."""

import copy

import numpy as np
import pytest
import torch
from diffusers import VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

from benchmarks.fuse_truth import Largest, recorded
from vqkernels import fuse

USED = np.array([3, 40, 5, 17, 60, 21, 40])


def quantizer(tmp_path, remap, **arguments):
    path = None
    if remap:
        path = tmp_path / "used.npy"
        np.save(path, USED)
    module = VectorQuantizer(61, 8, 0.25, remap=path, **arguments)
    module.embedding.weight.data.normal_()
    return module


@pytest.mark.parametrize("remap", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"legacy": False}, {"sane_index_shape": True}])
@pytest.mark.parametrize("unknown", ["random", "extra", 2])
def test_options(tmp_path, remap, arguments, unknown):
    original = quantizer(tmp_path, remap, unknown_index=unknown, **arguments)
    fused = copy.deepcopy(original)
    assert fuse(fused, verbose=False).fused
    x = torch.randn(2, 8, 5, 6)
    results = []
    for module in (original, fused):
        torch.manual_seed(0)
        z = x.clone().requires_grad_()
        quantized, loss, (_, _, indices) = module(z)
        gradients = torch.autograd.grad(quantized.square().sum() + loss, [z, module.embedding.weight])
        results.append([quantized, loss, indices, *gradients])
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)  # the same operations on the same codes


def test_no_matrix_of_rows_and_used_codes(tmp_path):
    module = quantizer(tmp_path, True)
    x = torch.randn(1, 8, 9, 9)
    for fused in (False, True):
        if fused:
            fuse(module, verbose=False)
        with recorded() as searches:
            module(x)
        with Largest(searches) as largest:
            largest.shapes = {(81, len(USED))}
            module(x)
        assert bool(largest.found) != fused


def test_decode_quantizes_too():
    model = VQModel(block_out_channels=(32,), norm_num_groups=8, num_vq_embeddings=61, latent_channels=4).eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        latents = model.encode(x).latents
        expected = model.decode(latents).sample
        with fuse(model, numerics="eager", verbose=False), recorded() as searches:
            assert torch.equal(model.decode(latents).sample, expected)
    assert len(searches) == 1


def test_paella():
    model = PaellaVQModel(embed_dim=32, bottleneck_blocks=1, num_vq_embeddings=61).eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = model(x, return_dict=False)[0]
        with fuse(model, verbose=False) as report:
            assert [m.kind for m in report.fused] == ["VectorQuantizer"]
            assert torch.equal(model(x, return_dict=False)[0], expected)
