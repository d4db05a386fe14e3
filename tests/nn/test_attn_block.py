"""The attention block of VQGAN: the reference beside diffusers' attention, the fused one beside the reference."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from twins import assert_fused_within_budget, initialized, kept_bytes, run

import vqkernels.nn
from vqkernels import reference


def twins(channels=64, numerics="fp32"):
    plain = initialized(reference.AttnBlock(channels))
    fused = vqkernels.nn.AttnBlock(channels, numerics=numerics)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.mark.parametrize("channels", [32, 512])
def test_reference_is_that_of_diffusers(channels):
    block = twins(channels)[0].double()
    other = Attention(
        channels, heads=1, dim_head=channels, norm_num_groups=32, eps=1e-6, bias=True, residual_connection=True
    ).double()
    names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    state = block.state_dict()
    other.load_state_dict(
        {
            f"{a}.{n}": state[f"{b}.{n}"].reshape(other.state_dict()[f"{a}.{n}"].shape)
            for a, b in names.items()
            for n in ("weight", "bias")
        }
    )
    x = torch.randn(2, channels, 5, 3, dtype=torch.float64)
    expected = other(x)
    assert (block(x) - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("shape", [(2, 64, 5, 3), (1, 64, 1, 2), (1, 64, 16, 16)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_within_budget(shape, memory_format):
    draws = max(4, 128 // (shape[2] * shape[3]))  # where positions are few, one sum or two make up the error of q and k
    assert_fused_within_budget(*twins(), torch.randn(shape).to(memory_format=memory_format), draws=draws)


def test_eager_is_the_reference_to_the_bit():
    plain, fused = twins(numerics="eager")
    x = torch.randn(2, 64, 5, 3)
    assert all(map(torch.equal, run(fused, x), run(plain, x)))


def test_no_matrix_of_all_positions_is_kept():
    _, fused = twins(32)
    sizes = [kept_bytes(fused, torch.randn(1, 32, side, side, requires_grad=True)) for side in (16, 32)]
    assert sizes[1] < 4.5 * sizes[0]  # 4 times the positions


@pytest.mark.parametrize("layer", [vqkernels.nn.AttnBlock, reference.AttnBlock])
def test_bad_channels(layer):
    with pytest.raises(ValueError, match="in_channels: expected a multiple of 32 groups, got 33"):
        layer(33)
