"""Triton's GEGLU: against the expression in float64, and it compiles for NVIDIA GPUs."""

import pytest
import torch
import torch.nn.functional as F
from feed_forward import Operation, check_feed_forward_kernels, check_refusals

from vqkernels.triton.geglu import geglu, geglu_backward


def operation(gate, approximate):
    def plain(x, bias):
        first, second = (x if bias is None else x + bias).chunk(2, -1)
        gated, other = (first, second) if gate == "first" else (second, first)
        return other * F.gelu(gated, approximate=approximate)

    return Operation(lambda x, bias: geglu(x, bias, gate, approximate), plain, halves=2)


@pytest.mark.parametrize(("gate", "approximate"), [("second", "none"), ("first", "tanh")])
def test_values_and_gradients(gate, approximate, device):
    check_feed_forward_kernels(operation(gate, approximate), geglu_backward, (gate, approximate), device)


@pytest.mark.parametrize(("gate", "approximate"), [("second", "none"), ("first", "tanh")])
def test_direct_calls(gate, approximate, device):
    check_refusals(operation(gate, approximate), geglu, geglu_backward, (gate, approximate), device)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability, compiled, tmp_path):
    programs = compiled(capability)
    for dtype, gate, approximate in ((torch.bfloat16, "second", "none"), (torch.float32, "first", "tanh")):
        x = torch.zeros(2, 3, 2560, dtype=dtype)
        geglu(x, x[0, 0], gate, approximate)
        geglu_backward(x[..., :1280], x, x[0, 0], gate, approximate, True)
        geglu_backward(x[..., :1280], x, None, gate, approximate, False)
    assert {key[0] for key in programs} == {
        "_gated_activation_kernel",
        "_gated_activation_backward_kernel",
        "_sum_partials_kernel",
    }
    for program in programs.values():
        assert "atom." not in program.ptx
        assert program.registers_and_stack(tmp_path)[1] == 0
