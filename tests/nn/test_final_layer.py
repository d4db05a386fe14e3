"""The last layer of diffusion transformers: the fused one beside the reference."""

import pytest
import torch
from twins import assert_fused_within_budget, initialized, run

import vqkernels.nn
from vqkernels import reference


def twins(numerics="fp32"):
    plain = initialized(reference.FinalLayer(48, 2, 4))
    fused = vqkernels.nn.FinalLayer(48, 2, 4, numerics=numerics)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.mark.parametrize("c_shape", [(3, 48), (3, 7, 48)])
def test_fused_within_budget(c_shape):
    assert_fused_within_budget(*twins(), torch.randn(3, 7, 48), torch.randn(c_shape))


def test_eager_is_the_reference_to_the_bit():
    plain, fused = twins("eager")
    inputs = torch.randn(3, 7, 48), torch.randn(3, 48)
    assert all(map(torch.equal, run(fused, *inputs), run(plain, *inputs)))


def test_reference_is_the_formula():
    layer = twins()[0].double()
    x, c = torch.randn(3, 7, 48, dtype=torch.float64), torch.randn(3, 48, dtype=torch.float64)
    shift, scale = (c * c.sigmoid() @ layer.adaLN_modulation[1].weight.T + layer.adaLN_modulation[1].bias).chunk(2, 1)
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    expected = (y * (1 + scale[:, None]) + shift[:, None]) @ layer.linear.weight.T + layer.linear.bias
    assert (layer(x, c) - expected).abs().max() < 1e-13 * 48 * expected.abs().max()


def test_a_new_one_gives_zeros():
    assert not any(p.any() for p in vqkernels.nn.FinalLayer(48, 2, 4).parameters())
