"""Triton's bias and GELU: against the expression in float64, and it compiles for NVIDIA GPUs."""

import pytest
import scipy.special
import torch
import torch.nn.functional as F
from feed_forward import Operation, check_feed_forward_kernels, check_refusals

from vqkernels.triton.bias_gelu import bias_gelu, bias_gelu_backward


def operation(approximate):
    return Operation(
        lambda x, bias: bias_gelu(x, bias, approximate),
        lambda x, bias: F.gelu(x if bias is None else x + bias, approximate=approximate),
        halves=1,
    )


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_values_and_gradients(approximate, device):
    check_feed_forward_kernels(operation(approximate), bias_gelu_backward, (approximate,), device)


def test_tail(device):
    """Relative accuracy: that of an exponential whose argument is x^2 / 2, and a few roundings."""
    x = torch.linspace(-12, -4, 512).reshape(1, 8, 64)
    wide = x.double()
    truth = wide * torch.from_numpy(scipy.special.ndtr(wide.numpy()))
    error = (bias_gelu(x.to(device), None, "none").cpu() / truth - 1).abs()
    assert (error <= (8 + wide.square()) * 2.0**-23).all()


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_no_nan_of_large_numbers(approximate, device):
    x = torch.tensor([1e38, -1e38, 1e20, -1e20, 33.0, -33.0, 0.0, -0.0], device=device).reshape(1, 1, 8)
    expected = torch.tensor([1e38, -0.0, 1e20, -0.0, 33.0, -0.0, 0.0, -0.0])
    assert torch.equal(bias_gelu(x, None, approximate).cpu().reshape(-1), expected)
    grad_x, _ = bias_gelu_backward(torch.ones_like(x), x, None, approximate, False)
    assert grad_x.reshape(-1).tolist() == [1, 0, 1, 0, 1, 0, 0.5, 0.5]


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_direct_calls(approximate, device):
    check_refusals(operation(approximate), bias_gelu, bias_gelu_backward, (approximate,), device)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability, compiled, tmp_path):
    programs = compiled(capability)
    for dtype, approximate in ((torch.bfloat16, "tanh"), (torch.float32, "none"), (torch.float64, "none")):
        x = torch.zeros(2, 3, 4608, dtype=dtype)
        bias_gelu(x, x[0, 0], approximate)
        bias_gelu_backward(x, x, x[0, 0], approximate, True)
        bias_gelu_backward(x, x, None, approximate, False)
    assert {key[0] for key in programs} == {"_bias_gelu_kernel", "_bias_gelu_backward_kernel", "_sum_partials_kernel"}
    for program in programs.values():
        assert "atom." not in program.ptx
        assert program.registers_and_stack(tmp_path)[1] == 0
