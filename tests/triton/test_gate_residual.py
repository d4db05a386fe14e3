"""Triton's gated branch on the residual stream: against the formula in float64."""

import pytest
import torch
from budget import assert_within_budget
from norm_chain import LAYOUTS

from vqkernels.triton.gate_residual import gate_residual, gate_residual_backward


def expected(x, branch, gate, grad, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in (branch, gate)]
    result = x.to(dtype) + leaves[1] * leaves[0]
    return result.detach(), *torch.autograd.grad(result, leaves, grad.to(dtype))


def actual(x, branch, gate, grad, layout, device):
    x, branch, gate, grad = (t.to(device) for t in (x, branch, gate, grad))
    return [t.cpu() for t in (gate_residual(x, branch, gate), *gate_residual_backward(grad, branch, gate, layout))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [1, 2, 3])
def test_values_and_gradients(layout, dtype, device):
    for batch, length, dim in ((3, 10, 20), (2, 1, 1), (1, 7, 65), (70, 1, 3), (2, 1, 1153), (0, 4, 5), (3, 0, 5)):
        x, branch, grad = torch.randn(3, batch, length, dim).to(dtype)
        gate = torch.randn(*LAYOUTS[layout](batch, length, dim)[:2], 3 * dim).to(dtype)[..., dim : 2 * dim]
        values = actual(x, branch, gate, grad, layout, device)
        of_dtype, truth = (expected(x, branch, gate, grad, d) for d in (dtype, torch.float64))
        if dtype == torch.float64:  # a product and a sum, of up to 70 products in the gate's gradient
            sums = (
                x.abs() + (gate * branch).abs(),
                truth[1].abs(),
                expected(x, branch.abs(), gate, grad.abs(), dtype)[2],
            )
            for value, exact, terms in zip(values, truth, sums, strict=True):
                assert ((value - exact).abs() <= 2 * 71 * 2.0**-53 * terms).all()
        else:
            assert_within_budget(values, of_dtype, truth)


def test_no_gradient_of_the_gate(device):
    x, branch, grad = torch.randn(3, 2, 5, 8)
    assert actual(x, branch, x[:, :1], grad, 0, device)[2].shape == (0,)


def test_dtypes_meet(device):
    """bfloat16 beside float32, and beside float64, is widened exactly; what is narrow is rounded once."""
    x, branch, grad = torch.randn(3, 2, 5, 8)
    for narrow, wide in ((torch.bfloat16, torch.float32), (torch.float16, torch.float64)):
        gate = torch.randn(2, 1, 8).to(wide)
        values = actual(x.to(narrow), branch.to(narrow), gate, grad.to(wide), 2, device)
        truth = expected(x.to(narrow), branch.to(narrow), gate, grad.to(wide), torch.float64)
        assert [t.dtype for t in values] == [wide, narrow, wide]
        for value, exact in zip(values, truth, strict=True):
            rounding = torch.finfo(value.dtype).eps
            assert ((value.double() - exact).abs() <= rounding * (exact.abs() + 10 * (value.dtype == wide))).all()


def test_direct_calls_check_shapes(device):
    x = torch.randn(2, 3, 4, device=device)
    for place, name in enumerate(("branch", "gate"), 1):
        arguments = [x, x, x[:, :1]]
        arguments[place] = x[..., :2]
        with pytest.raises(ValueError, match=rf"^{name}: expected shape"):
            gate_residual(*arguments)
        with pytest.raises(ValueError, match=rf"^{name}: expected shape"):
            gate_residual_backward(*arguments, 2)
    with pytest.raises(RuntimeError, match="unknown layouts"):
        gate_residual_backward(x, x, x, 7)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability, compiled, tmp_path):
    programs = compiled(capability)
    x = torch.zeros(2, 3, 1152, dtype=torch.bfloat16)
    for layout in (0, 1, 2, 3):
        actual(x, x, x[:, :1], x, layout, "cpu")
    assert {key[0] for key in programs} == {
        "_gate_residual_kernel",
        "_gate_residual_backward_kernel",
        "_sum_partials_kernel",
    }
    for program in programs.values():
        assert "atom." not in program.ptx
        assert program.registers_and_stack(tmp_path)[1] == 0
