"""Triton's SwiGLU: against the expression in float64, and it compiles for NVIDIA GPUs."""

import pytest
import torch
import torch.nn.functional as F
from feed_forward import Operation, check_feed_forward_kernels, check_refusals

from vqkernels.triton.swiglu import swiglu, swiglu_backward


def operation(gate):
    def plain(x, bias):
        first, second = (x if bias is None else x + bias).chunk(2, -1)
        return F.silu(first) * second if gate == "first" else first * F.silu(second)

    return Operation(lambda x, bias: swiglu(x, bias, gate), plain, halves=2)


@pytest.mark.parametrize("gate", ["first", "second"])
def test_values_and_gradients(gate, device):
    check_feed_forward_kernels(operation(gate), swiglu_backward, (gate,), device)


@pytest.mark.parametrize("gate", ["first", "second"])
def test_direct_calls(gate, device):
    check_refusals(operation(gate), swiglu, swiglu_backward, (gate,), device)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability, compiled, tmp_path):
    programs = compiled(capability)
    for dtype, gate in ((torch.bfloat16, "first"), (torch.float32, "second")):
        x = torch.zeros(2, 3, 6144, dtype=dtype)
        swiglu(x, x[0, 0], gate)
        swiglu_backward(x[..., :3072], x, x[0, 0], gate, True)
        swiglu_backward(x[..., :3072], x, None, gate, False)
    assert {key[0] for key in programs} == {
        "_gated_activation_kernel",
        "_gated_activation_backward_kernel",
        "_sum_partials_kernel",
    }
    for program in programs.values():
        assert "atom." not in program.ptx
        assert program.registers_and_stack(tmp_path)[1] == 0
