"""Bias and GELU: against float64, invariances, views, special values, and the tails of the distribution."""

import pytest
import scipy.special
import torch
import torch.nn.functional as F
from feed_forward import (
    SHAPES,
    Operation,
    check,
    check_compiles,
    check_direct_calls,
    check_dtypes,
    check_empty,
    check_gradients,
    check_invariances,
    check_no_copies,
    check_schemas,
    check_special_values,
    check_views,
)
from vq_cases import DTYPES, LEVELS, cpu_level, same_bits

import vqkernels


def operation(approximate):
    return Operation(
        lambda x, bias, **kw: vqkernels.bias_gelu(x, bias, approximate=approximate, **kw),
        lambda x, bias: F.gelu(x if bias is None else x + bias, approximate=approximate),
        halves=1,
    )


pytestmark = pytest.mark.parametrize("approximate", ["tanh", "none"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(approximate, dtype):
    op = operation(approximate)
    for shape in SHAPES:
        x, bias = op.data(shape, dtype)
        check(op, x, bias)
        check(op, x, None)


def test_large_offset(approximate):
    op = operation(approximate)
    x, bias = op.data((64, 96))
    check(op, x + 1e4, bias - 1e4)


@pytest.mark.parametrize("level", LEVELS)
def test_tails(approximate, level):
    """Relative accuracy where the value is tiny, which torch's own erf form loses altogether."""
    x = torch.linspace(-13, -4, 4096)
    wide = x.double()
    if approximate == "none":
        truth = wide * torch.from_numpy(scipy.special.ndtr(wide.numpy()))
        slope = truth / wide + wide * torch.exp(-wide.square() / 2) / (2 * torch.pi) ** 0.5
        # Of the distribution 4 ulp (lanes_math.h) and of the product 1; the slope is a difference of about 1 / x^2.
        value_bound, slope_bound = 5 * 2.0**-23, 5 * 2.0**-23 * (1 + wide.square())
    else:
        u = (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
        share = torch.exp(2 * u) / (1 + torch.exp(2 * u))
        truth = wide * share
        terms = wide * (1 - share) * 2 * (2 / torch.pi) ** 0.5 * (1 + 3 * 0.044715 * wide.square())
        slope = share * (1 + terms)
        # The exponential multiplies the rounding of its argument 2 u, 2 ulp, by the argument.
        value_bound = (4 + 2 * (2 * u).abs()) * 2.0**-23
        slope_bound = value_bound + 2.0**-23 * 4
    leaf = x.clone().requires_grad_()
    with cpu_level(level):
        y = vqkernels.bias_gelu(leaf, approximate=approximate)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
    smallest = torch.finfo(torch.float32).smallest_normal
    normal = truth.abs() > smallest / 2.0**-5
    error, slope_error = (y.detach() / truth - 1).abs(), (grad / slope - 1).abs()
    assert normal.sum() > 2000
    assert (error <= value_bound)[normal].all()
    assert (slope_error <= slope_bound)[normal].all()
    torch_error = (F.gelu(x, approximate=approximate) / truth - 1).abs()[normal].max()
    assert error[normal].max() < torch_error / 10


def test_invariances(approximate):
    check_invariances(operation(approximate))


def test_views(approximate):
    check_views(operation(approximate))
    check_no_copies(operation(approximate))


def test_empty(approximate):
    check_empty(operation(approximate))


def test_special_values(approximate):
    check_special_values(operation(approximate))


def test_zero_keeps_its_sign(approximate):
    """Without a bias nothing is added."""
    zeros = torch.tensor([0.0, -0.0])
    assert same_bits(vqkernels.bias_gelu(zeros, approximate=approximate), zeros)


def test_half_overflow(approximate):
    """The sum of x and bias overflows float16, what is computed of it in float32 does not."""
    x = torch.tensor([[60000.0, -60000.0, 30000.0]], dtype=torch.float16)
    y = vqkernels.bias_gelu(x, x[0], approximate=approximate)
    assert y.tolist() == [[torch.inf, 0, 60000]]


def test_dtypes(approximate):
    check_dtypes(operation(approximate))


def test_gradients(approximate):
    check_gradients(operation(approximate))


def test_opcheck(approximate):
    check_schemas(operation(approximate), "bias_gelu", approximate)


def test_compile(approximate):
    check_compiles(operation(approximate))


def test_direct_calls(approximate):
    check_direct_calls(operation(approximate), "bias_gelu", approximate)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": None}, TypeError, "x: expected a tensor of float32 .*, got NoneType None"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "x: expected a tensor of float32 .*, got int64"),
        ({"x": torch.ones(())}, ValueError, r"x: expected shape \[..., D\] with D at least 1, got \[\]"),
        ({"x": torch.ones(3, 0)}, ValueError, r"x: expected shape \[..., D\] with D at least 1, got \[3, 0\]"),
        ({"bias": 1.0}, TypeError, "bias: expected a tensor of float32 .*, got float 1.0"),
        ({"bias": torch.ones(2)}, ValueError, r"bias: expected shape \[3\] to match x of shape \[2, 3\], got \[2\]"),
        ({"bias": torch.ones(1, 3)}, ValueError, r"bias: expected shape \[3\] .*, got \[1, 3\]"),
        ({"bias": torch.ones(3, device="meta")}, ValueError, "bias: expected device cpu to match x, got meta"),
        ({"approximate": "erf"}, ValueError, "approximate: expected one of tanh, none, got 'erf'"),
        ({"backend": "gpu"}, ValueError, "backend: expected None or one of native, triton, reference, got 'gpu'"),
    ],
)
def test_bad_input(approximate, arguments, error, message):
    with pytest.raises(error, match=message):
        vqkernels.bias_gelu(**({"x": torch.ones(2, 3), "approximate": approximate} | arguments))


def test_reference_backend(approximate):
    op = operation(approximate)
    x, bias = op.data((3, 4, 8))
    assert same_bits(op.fused(x, bias, backend="reference"), op.plain(x, bias))
    assert vqkernels.bias_gelu(x.to("meta"), bias.to("meta")).shape == x.shape
