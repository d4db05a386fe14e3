"""GEGLU of both half orders: against float64, invariances, views, and special values."""

import pytest
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
from vq_cases import DTYPES, same_bits

import vqkernels


def operation(gate, approximate):
    def plain(x, bias):
        first, second = (x if bias is None else x + bias).chunk(2, -1)
        gated, other = (first, second) if gate == "first" else (second, first)
        return other * F.gelu(gated, approximate=approximate)

    def fused(x, bias, **options):
        return vqkernels.geglu(x, bias=bias, gate=gate, approximate=approximate, **options)

    return Operation(fused, plain, halves=2)


pytestmark = pytest.mark.parametrize(
    ("gate", "approximate"), [("second", "none"), ("first", "none"), ("second", "tanh"), ("first", "tanh")]
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(gate, approximate, dtype):
    op = operation(gate, approximate)
    for shape in SHAPES:
        x, bias = op.data(shape, dtype)
        check(op, x, bias)
        check(op, x, None)


def test_large_offset(gate, approximate):
    op = operation(gate, approximate)
    x, bias = op.data((64, 96))
    check(op, x + 1e4, bias - 1e4)


def test_invariances(gate, approximate):
    check_invariances(operation(gate, approximate))


def test_views(gate, approximate):
    check_views(operation(gate, approximate))
    check_no_copies(operation(gate, approximate))


def test_empty(gate, approximate):
    check_empty(operation(gate, approximate))


def test_special_values(gate, approximate):
    check_special_values(operation(gate, approximate))


def test_half_overflow(gate, approximate):
    """The product overflows float16 where the expression's does; its factors in float32 do not."""
    op = operation(gate, approximate)
    x = torch.tensor([[60000.0, 200.0, 1.0, 300.0]], dtype=torch.float16)
    x = torch.cat([x[:, :2], x[:, 2:]], -1) if gate == "first" else torch.cat([x[:, 2:], x[:, :2]], -1)
    assert op.fused(x, x[0]).isinf().tolist() == [[True, True]]
    x, bias = torch.full((1, 2), 40000.0, dtype=torch.float16), torch.tensor([40000.0, -39999.0]).half()
    x, bias = (x, bias) if gate == "second" else (x, bias.flip(0))
    assert not op.plain(x, bias).isfinite().any()  # 80000 is beyond float16
    assert op.fused(x, bias).isfinite().logical_not().equal(op.plain(x.float(), bias.float()).half().isinf())


def test_dtypes(gate, approximate):
    check_dtypes(operation(gate, approximate))


def test_gradients(gate, approximate):
    check_gradients(operation(gate, approximate))


def test_opcheck(gate, approximate):
    check_schemas(operation(gate, approximate), "geglu", gate, approximate)


def test_compile(gate, approximate):
    check_compiles(operation(gate, approximate))


def test_direct_calls(gate, approximate):
    op = operation(gate, approximate)
    check_direct_calls(op, "geglu", gate, approximate)
    with pytest.raises(RuntimeError, match=r"expected x \[B, L, 2 D\]"):
        torch.ops.vqkernels.geglu(torch.ones(1, 2, 3), None, gate, approximate)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": None}, TypeError, "x: expected a tensor of float32 .*, got NoneType None"),
        ({"x": torch.ones(2, 3)}, ValueError, r"x: expected shape \[..., 2 D\], got \[2, 3\]"),
        ({"x": torch.ones(3, 0)}, ValueError, r"x: expected shape .*, got \[3, 0\]"),
        ({"bias": torch.ones(2)}, ValueError, r"bias: expected shape \[4\] to match x of shape \[2, 4\], got \[2\]"),
        ({"bias": torch.ones(4, device="meta")}, ValueError, "bias: expected device cpu to match x, got meta"),
        ({"gate": "third"}, ValueError, "gate: expected one of first, second, got 'third'"),
        ({"approximate": "erf"}, ValueError, "approximate: expected one of tanh, none, got 'erf'"),
        ({"backend": "gpu"}, ValueError, "backend: expected None or one of native, triton, reference, got 'gpu'"),
    ],
)
def test_bad_input(gate, approximate, arguments, error, message):
    with pytest.raises(error, match=message):
        vqkernels.geglu(**({"x": torch.ones(2, 4), "gate": gate, "approximate": approximate} | arguments))


def test_reference_backend(gate, approximate):
    op = operation(gate, approximate)
    x, bias = op.data((3, 4, 8))
    assert same_bits(op.fused(x, bias, backend="reference"), op.plain(x, bias))
    assert op.fused(x.to("meta"), bias.to("meta")).shape == (3, 4, 8)
