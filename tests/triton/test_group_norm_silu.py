"""Triton's group normalisation with SiLU: values and gradients against float64."""

import re

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget

import vqkernels
from vqkernels.triton.group_norm_silu import group_norm_silu, group_norm_silu_backward


def expected(x, groups, weight, bias, grad, activation, dtype):
    leaves = [t if t is None else t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    y = torch.group_norm(leaves[0], groups, *leaves[1:], 1e-6)
    y = F.silu(y) if activation == "silu" else y
    gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(dtype)))
    return y.detach(), *(None if t is None else next(gradients) for t in leaves)


def actual(x, groups, weight, bias, grad, activation, device):
    x, weight, bias, grad = (t if t is None else t.to(device) for t in (x, weight, bias, grad))
    y, mean, rstd = group_norm_silu(x, groups, weight, bias, 1e-6, activation)
    assert y.stride() == x.stride()
    gx, gw, gb = group_norm_silu_backward(grad, x, weight, bias, mean, rstd, activation)
    assert gx.stride() == x.stride()
    affine = (None if p is None else g.to(p.dtype).cpu() for p, g in ((weight, gw), (bias, gb)))
    return y.cpu(), gx.cpu(), *affine


def make_inputs(shape, dtype, last, affine=True, mean=0.0):
    x, grad = (torch.randn(shape) + mean).to(dtype), torch.randn(shape).to(dtype)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    weight, bias = (torch.randn(shape[1]).to(dtype) if affine else None for _ in range(2))
    return x, weight, bias, grad


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 64, 9, 7), 32),
        ((1, 6, 40, 33), 1),
        ((3, 40, 21), 8),
        ((1, 36, 2, 3, 4), 4),
        ((9, 30, 1), 10),
        ((1, 2, 4700), 1),
    ],
)
def test_values_and_gradients(shape, groups, dtype, last, device):
    for activation, affine in (("silu", True), ("none", False)):
        x, weight, bias, grad = make_inputs(shape, dtype, last, affine)
        problem = x, groups, weight, bias, grad, activation
        wanted = [expected(*problem, d) for d in (dtype, torch.float64)]
        assert_within_budget(actual(*problem, device), *wanted)


@pytest.mark.parametrize("last", [False, True])
def test_float64(last, device):
    """Both are off by some roundings of the largest terms."""
    x, weight, bias, grad = make_inputs((2, 24, 130), torch.float64, last)
    problem = x, 3, weight, bias, grad, "silu"
    for result, exact in zip(actual(*problem, device), expected(*problem, torch.float64), strict=True):
        assert (result - exact).abs().max() <= 2.0**-52 * 40 * exact.abs().max()


@pytest.mark.parametrize("last", [False, True])
def test_large_mean_and_values(last, device):
    x, weight, bias, grad = make_inputs((1, 8, 900), torch.float32, last, mean=1e4)
    problem = x, 2, weight, bias, grad, "silu"
    wanted = [expected(*problem, d) for d in (torch.float32, torch.float64)]
    assert_within_budget(actual(*problem, device), *wanted)
    huge = group_norm_silu((x - 1e4).to(device) * 1e25, 2, weight.to(device), bias.to(device), 1e-6, "none")[0]
    assert torch.equal(huge.cpu(), bias[:, None].expand_as(x))


def test_broken_values_stay_in_their_group(device):
    for value in (torch.nan, torch.inf):
        for last in (False, True):
            x, weight, bias, grad = make_inputs((2, 8, 40), torch.float32, last)
            x[1, 1, 4] = value
            y, gx, gw, _ = actual(x, 4, weight, bias, grad, "silu", device)
            assert y.isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[1, 0], [1, 1]]
            assert gx.isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[1, 0], [1, 1]]
            assert gw.isnan().tolist() == [True] * 2 + [False] * 6


def test_empty_and_views(device):
    for shape in ((0, 4, 3), (2, 4, 0)):
        x, weight, bias, grad = make_inputs(shape, torch.float32, False)
        y, gx, gw, gb = actual(x, 2, weight, bias, grad, "silu", device)
        assert y.shape == gx.shape == shape
        assert torch.equal(gw, torch.zeros(4))
        assert torch.equal(gb, torch.zeros(4))
    x = torch.randn(4, 12, 5, 6, device=device)
    for view in (x[::2], x.transpose(2, 3), x[:, 3:9], x[:1].expand(2, 12, 5, 6)):
        y = vqkernels.group_norm_silu(view, 3, backend="triton")
        torch.testing.assert_close(y, vqkernels.group_norm_silu(view, 3, backend="reference"))


def test_autograd(device):
    x, weight, bias, grad = (t.to(device) for t in make_inputs((2, 6, 5, 4), torch.float32, True))
    results = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = vqkernels.group_norm_silu(leaves[0], 3, *leaves[1:], backend=backend)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    for value, wanted in zip(*results, strict=True):
        torch.testing.assert_close(value, wanted)


def test_direct_calls_check_shapes(device):
    x, mean = torch.zeros(2, 8, 3, device=device), torch.zeros(2, 2, device=device)
    for arguments in ((x, 3, None, None), (x, 0, None, None), (x[0, 0], 1, None, None), (x, 2, mean, None)):
        with pytest.raises(ValueError, match=r"^(x|weight): expected shape"):
            group_norm_silu(*arguments, 1e-6, "silu")
    with pytest.raises(RuntimeError, match="unknown activation"):
        group_norm_silu(x, 2, None, None, 1e-6, "tanh")
    for grad, statistics in ((x[:1], (mean, mean)), (x, (mean[:1], mean)), (x, (mean, mean[:1])), (x, (mean[0], mean))):
        with pytest.raises(ValueError, match=r"^(grad|mean|rstd): expected shape"):
            group_norm_silu_backward(grad, x, None, None, *statistics, "silu")


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        (80, torch.float32),
        (80, torch.bfloat16),
        (90, torch.float32),
        (90, torch.float64),
        (90, torch.bfloat16),
    ],
)
def test_compiles(capability, dtype, compiled):
    programs = compiled(capability)
    for last in (False, True):
        x, weight, bias, grad = make_inputs((2, 64, 12, 12), dtype, last)
        for activation, affine in (("silu", (weight, bias)), ("none", (None, None))):
            _, mean, rstd = group_norm_silu(x, 32, *affine, 1e-6, activation)
            group_norm_silu_backward(grad, x, *affine, mean, rstd, activation)
    assert {key[0] for key in programs} == {
        "group_gradients_kernel",
        "input_gradient_kernel",
        "moments_kernel",
        "normalize_kernel",
        "parameter_gradients_kernel",
        "statistics_kernel",
        "sums_kernel",
    }
    for program in programs.values():
        assert re.search(r"\bst\.global", program.ptx)
        assert not re.search(r"\batom|\bred\.|div\.full", program.ptx)
