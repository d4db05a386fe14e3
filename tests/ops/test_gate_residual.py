"""The gated residual: against float64, and against the expression to the bit where promised."""

import itertools

import pytest
import torch
from budget import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from modulation_cases import DTYPES, SHAPES, arguments, assert_same, saved_bytes, spread, values_and_gradients
from vq_cases import LEVELS, cpu_level

import vqkernels

ops = torch.ops.vqkernels


def fused(a, **options):
    return [vqkernels.gate_residual(a.x, a.branch, a.gate, **options)]


def expression(a):
    return [a.x + (a.branch if a.gate is None else spread(a.gate, a.x) * a.branch)]


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64])
@pytest.mark.parametrize("kind", SHAPES)
def test_values_and_gradients(kind, dtype):
    for i, shape in enumerate([(2, 33, 7), (3, 1, 64), (2, 255, 65), (5, 1152), (2, 3, 4, 17), (1, 4097, 64)]):
        a = arguments(shape, "branch gate", kind, dtype, seed=i)
        truth = values_and_gradients(expression, a.to(torch.float64), grad_dtype=dtype)
        assert_within_budget(values_and_gradients(fused, a), values_and_gradients(expression, a), truth)


def test_one_column():
    """Where the largest of few errors is a matter of luck: a sum of n terms has at most n roundings."""
    for shape in [(2, 3, 1), (1, 4097, 1), (3000, 1)]:
        a = arguments(shape, "branch gate", "D")
        *_, actual = values_and_gradients(fused, a)
        *_, exact = values_and_gradients(expression, a.to(torch.float64), grad_dtype=torch.float32)
        terms = a.branch.double() * torch.randn(shape, generator=torch.Generator().manual_seed(1000))
        assert torch.allclose(terms.sum(), exact[0], rtol=1e-12)
        assert (actual - exact).abs() <= 33 * 2.0**-24 * terms.abs().sum()


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(0, 70), st.integers(1, 70)),
    kind=st.sampled_from(sorted(SHAPES)),
    dtype=st.sampled_from(DTYPES),
)
def test_levels_threads_and_repeats_are_bitwise_equal(shape, kind, dtype):
    a = arguments(shape, "branch gate", kind, dtype)
    results = []
    for level, threads in itertools.product(LEVELS, (1, 3)):
        torch.set_num_threads(threads)
        with cpu_level(level):
            results.append(values_and_gradients(fused, a))
    for result in results:
        assert_same(result, results[0])


@settings(max_examples=25)
@given(
    shape=st.sampled_from([(2, 5, 7), (3, 300, 24), (2, 3, 4, 33), (5, 16), (0, 3, 8), (3, 0, 8)]),
    kind=st.sampled_from(sorted(SHAPES)),
    dtype=st.sampled_from(DTYPES),
    gated=st.booleans(),
)
def test_eager_numerics_equal_the_expression(shape, kind, dtype, gated):
    a = arguments(shape, "branch gate" if gated else "branch", kind, dtype)
    expected = values_and_gradients(expression, a)
    assert_same(values_and_gradients(lambda a: fused(a, numerics="eager"), a), expected)
    assert_same(values_and_gradients(lambda a: fused(a, numerics="eager", backend="reference"), a), expected)


@pytest.mark.parametrize("kind", ["D", "B,D", "B,L,D"])
def test_gradcheck(kind):
    a = arguments((2, 3, 5), "branch gate", kind, torch.float64)
    inputs = [t.requires_grad_() for t in a.tensors().values()]
    assert torch.autograd.gradcheck(vqkernels.gate_residual, inputs)


def test_float64_and_mixed_dtypes():
    for dtypes in itertools.product(DTYPES, repeat=3):
        a = arguments((2, 40, 9), "branch gate", dtype=torch.float64)
        a.x, a.branch, a.gate = (t.to(dtype) for t, dtype in zip(a["x branch gate"], dtypes, strict=True))
        truth = values_and_gradients(expression, a.to(torch.float64), grad_dtype=expression(a)[0].dtype)
        plain = values_and_gradients(expression, a)
        for result, reference, exact in zip(values_and_gradients(fused, a), plain, truth, strict=True):
            assert result.dtype == reference.dtype
            roundings = 32 if result.dtype == torch.float64 else 1  # the expression in float64 is the truth itself
            allowed = 2 * (reference.double() - exact).abs().max()
            allowed += roundings * torch.finfo(result.dtype).eps * exact.abs().max()
            assert ((result.double() - exact).abs() <= allowed).all()


def test_product_is_not_rounded():
    """A product that does not fit float16, though its sum with x does: only the eager expression overflows."""
    x = torch.full((1, 1, 8), -60000.0).half()
    branch, gate = torch.full((1, 1, 8), 300.0).half(), torch.full((8,), 300.0).half()
    assert torch.equal(vqkernels.gate_residual(x, branch, gate), torch.full((1, 1, 8), 30000.0).half())
    assert vqkernels.gate_residual(x, branch, gate, numerics="eager").isinf().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    x, branch = torch.randn(2, 2, 5, 7).to(dtype)
    for layout, size in enumerate([(2, 1, 7), (1, 1, 7), (2, 1, 7), (2, 5, 7)]):
        gate = torch.randn(size).to(dtype)
        for op in (ops.gate_residual.default, ops.gate_residual_eager.default):
            torch.library.opcheck(op, (x, branch, gate), test_utils=utilities)
        torch.library.opcheck(ops.gate_residual_backward.default, (x, branch, gate, layout), test_utils=utilities)
        torch.library.opcheck(ops.gate_residual_eager_backward.default, (x, branch, gate), test_utils=utilities)


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_compile(numerics):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, b, g: vqkernels.gate_residual(x, b, g, numerics=numerics), fullgraph=True)
    a = arguments((2, 6, 20), "branch gate", dtype=torch.bfloat16)
    result = values_and_gradients(lambda a: [compiled(a.x, a.branch, a.gate)], a)
    assert_same(result, values_and_gradients(lambda a: fused(a, numerics=numerics), a))


def test_views_and_saved_memory():
    gate = torch.randn(4, 60).chunk(3, 1)[1]
    x, branch = torch.randn(6, 4, 30).transpose(0, 1)[..., 5:25], torch.randn(4, 6, 40)[..., ::2]
    dense = [t.contiguous() for t in (x, branch, gate)]
    assert_same([vqkernels.gate_residual(x, branch, gate)], [vqkernels.gate_residual(*dense)])
    tensors = [t.requires_grad_() for t in dense]
    assert saved_bytes(lambda: ([vqkernels.gate_residual(*tensors)], tensors)) == 0


def test_bad_arguments():
    x = torch.randn(2, 3, 4)
    cases = [
        (ValueError, r"x: expected shape \[B, ..., D\] with D at least 1, got \[4\]", {"x": x[0, 0]}),
        (ValueError, r"branch: expected shape \[2, 3, 4\] to match x .* got \[2, 4\]", {"branch": x[:, 0]}),
        (ValueError, r"gate: expected shape \[4\] or \[2, 4\] or .* got \[3, 4\]", {"gate": x[0]}),
        (ValueError, "numerics: expected one of fp32, eager, got None", {"numerics": None}),
    ]
    for error, message, changed in cases:
        with pytest.raises(error, match=message):
            vqkernels.gate_residual(**{"x": x, "branch": x, "gate": None} | changed)
    with pytest.raises(RuntimeError, match="gate has an unexpected shape"):
        ops.gate_residual(x, x, x[:, :2])
