"""The gated residual and its modulated norm in one pass: against float64, and equal to its parts run one by one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modulation_cases import (
    DTYPES,
    SHAPES,
    Arguments,
    arguments,
    assert_accurate,
    assert_same,
    expression,
    fused,
    saved_bytes,
    several,
    values_and_gradients,
)
from vq_cases import LEVELS, cpu_level, same_bits

import vqkernels

ops = torch.ops.vqkernels

NAMES = (
    "branch",
    "branch gate shift scale",
    "branch shift scale weight bias",
    "branch gate shift scale shift2 scale2",
    "branch gate scale shift2 weight bias",
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("names", NAMES)
def test_values_and_gradients(names, norm, dtype):
    for i, shape in enumerate([(2, 33, 7), (3, 1, 64), (2, 255, 65), (1, 70, 1152)]):
        assert_accurate(several(shape, names, dtype=dtype, seed=i), norm)


@pytest.mark.parametrize(
    ("names", "unused"),
    [
        ("branch gate shift scale weight bias", (0,)),
        ("branch shift scale", (0,)),
        ("branch gate", (1,)),
        ("branch gate shift2 scale2 weight bias", (1,)),
    ],
)
def test_results_without_a_gradient(names, unused):
    assert_accurate(several((2, 40, 33), names), unused=unused)


@pytest.mark.parametrize("names", NAMES)
def test_equals_its_parts_in_float32(names):
    """Where the residual needs no rounding, one pass gives what two give, to the bit."""
    a = arguments((2, 40, 65), names)
    whole = fused(a)
    residual = vqkernels.gate_residual(a.x, a.branch, a.gate)
    parts = fused(Arguments(residual, **{n: t for n, t in a.tensors().items() if n not in ("x", "branch", "gate")}))
    assert_same(whole, [residual, *parts])


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(0, 70), st.integers(1, 70)),
    kinds=st.tuples(st.sampled_from(sorted(SHAPES)), st.sampled_from(sorted(SHAPES))),
    names=st.sampled_from(NAMES),
    norm=st.sampled_from(["layer", "rms"]),
    dtype=st.sampled_from(DTYPES),
)
def test_levels_threads_and_repeats_are_bitwise_equal(shape, kinds, names, norm, dtype):
    a = arguments(shape, names, kinds[0], dtype)
    a.gate = None if a.gate is None else arguments(shape, "gate", kinds[1], dtype).gate
    results = []
    for level, threads in itertools.product(LEVELS, (1, 3)):
        torch.set_num_threads(threads)
        with cpu_level(level):
            results.append(values_and_gradients(lambda a: fused(a, norm), a))
    for result in results:
        assert_same(result, results[0])


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("names", ["branch shift scale", "branch gate shift scale shift2 scale2 weight bias"])
@pytest.mark.parametrize("kind", ["D", "B,D", "B,L,D"])
def test_gradcheck(norm, names, kind):
    a = arguments((2, 3, 5), names, kind, torch.float64)
    given = list(a.tensors())
    inputs = [t.requires_grad_() for t in a.tensors().values()]
    call = lambda *t: tuple(fused(Arguments(**dict(zip(given, t, strict=True))), norm))  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (0, 8)])
def test_empty(shape):
    a = arguments(shape, "branch gate shift scale weight bias")
    assert_same(values_and_gradients(fused, a), values_and_gradients(expression, a))


def test_views_are_read_as_they_are():
    modulation = torch.randn(4, 6 * 20)
    gate, shift, scale = modulation.chunk(6, 1)[1:4]
    x, branch = torch.randn(6, 4, 30).transpose(0, 1)[..., 5:25], torch.randn(4, 6, 40)[..., ::2]
    a = Arguments(x, branch, gate, shift, scale)
    dense = Arguments(**{name: t.contiguous() for name, t in a.tensors().items()})
    assert_same(values_and_gradients(fused, a), values_and_gradients(fused, dense))


def test_rows_far_from_zero():
    for dim in (7, 384, 1152):
        assert_accurate(several((2, 9, dim), "branch gate shift scale", offset=1e4))


def test_norm_sees_the_sum_before_it_is_rounded():
    """A branch that bfloat16 loses beside x still decides the norm of a row."""
    x, branch = torch.full((1, 1, 16), 256.0), torch.tensor([0.25, -0.25] * 8).view(1, 1, 16)
    residual, y = vqkernels.gate_residual_norm_modulate(x.bfloat16(), branch.bfloat16(), eps=0.0)
    assert torch.equal(residual, x.bfloat16())
    assert torch.equal(y, branch.sign().bfloat16())


def test_autocast_dtypes():
    """A residual stream in float32 meets a branch and a gate in bfloat16."""
    a = arguments((2, 40, 33), "branch gate shift scale", dtype=torch.bfloat16)
    a.x = a.x.float()
    actual = values_and_gradients(fused, a)
    plain = values_and_gradients(expression, a)
    truth = values_and_gradients(expression, a.to(torch.float64), grad_dtype=torch.float32)
    for result, reference, exact in zip(actual, plain, truth, strict=True):
        assert result.dtype == reference.dtype
        allowed = 2 * (reference.double() - exact).abs().max() + torch.finfo(result.dtype).eps * exact.abs()
        assert ((result.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_row_stays_alone(bad):
    a = arguments((2, 40, 17), "branch gate shift scale weight bias")
    whole = values_and_gradients(fused, a)
    a.branch[1, 7, 3] = bad
    broken, plain = values_and_gradients(fused, a), values_and_gradients(expression, a)
    rest = torch.ones(2, 40, dtype=torch.bool)
    rest[1, 7] = False
    for result, before, reference in zip(broken, whole, plain, strict=True):
        assert torch.equal(result.isnan(), reference.isnan())
        if result.shape == a.x.shape:
            assert same_bits(result[rest], before[rest])


TWO = "branch gate shift scale shift2 scale2 weight bias"


@pytest.mark.parametrize(("numerics", "backend"), [("fp32", "native"), ("eager", "native"), ("fp32", "reference")])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(
    ("names", "used"),
    [
        ("branch gate shift scale weight bias", (0,)),
        ("branch shift scale", (0,)),
        ("branch", (0,)),
        (TWO, (0,)),
        (TWO, (0, 2)),
        (TWO, (0, 1)),
        (TWO, (2,)),
        (TWO, (1,)),
    ],
)
def test_what_is_not_in_use_has_no_part_in_gradients(names, used, norm, numerics, backend):
    """Rows without an rstd, and a scale that is infinite, of results that nobody reads: gradients are as without."""
    a = arguments((2, 40, 17), names)
    unread = set((1, 2) if "shift2" in names else (1,)) - set(used)
    if not {1, 2} & set(used):
        a.x[1, 7], a.branch[1, 7] = 3.0, 0.0  # with eps 0 its rstd is infinite under "layer", under "rms" this is:
        a.x[0, 5], a.branch[0, 5] = 0.0, 0.0
        a.x[1, 9, 2] = torch.inf
    if 1 in unread and a.scale is not None:
        a.scale[0, 3] = torch.inf
    if 2 in unread and a.scale2 is not None:
        a.scale2[0, 3] = torch.inf

    def gradients(call, a):
        a = Arguments(**{name: t.detach().requires_grad_() for name, t in a.tensors().items()})
        outputs = [call(a)[i] for i in used]
        grads = [torch.randn(2, 40, 17, generator=torch.Generator().manual_seed(i)).to(outputs[0].dtype) for i in used]
        return torch.autograd.grad(outputs, list(a.tensors().values()), grads, allow_unused=True)

    actual = gradients(lambda a: fused(a, norm, 0.0, numerics=numerics, backend=backend), a)
    plain = gradients(lambda a: expression(a, norm, 0.0), a)
    truth = gradients(lambda a: expression(a, norm, 0.0), a.to(torch.float64))
    for result, reference, exact in zip(actual, plain, truth, strict=True):
        assert (result is None) == (reference is None)
        if result is None:
            continue
        assert torch.equal(result.isnan(), reference.isnan())
        if numerics == "eager":
            assert same_bits(result, reference)
        allowed = 64 * torch.finfo(result.dtype).eps * exact.abs().nan_to_num(0, 0).max()
        assert ((result.double() - exact).abs().nan_to_num(0) <= allowed).all()
    assert not actual[0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    x, branch, grad = torch.randn(3, 2, 5, 7).to(dtype)
    for gate_size, two in [((2, 1, 7), True), ((1, 1, 7), False), ((2, 5, 7), True)]:
        gate, shift = torch.randn(gate_size).to(dtype), torch.randn(2, 1, 7).to(dtype)
        args = (x, branch, gate, shift, shift, None, shift if two else None, torch.randn(7), None, "layer", 1e-5, two)
        torch.library.opcheck(ops.gate_residual_norm_modulate.default, args, test_utils=utilities)
        *_, mean, rstd = ops.gate_residual_norm_modulate(*args)
        layout = {(2, 1, 7): 2, (1, 1, 7): 1, (2, 5, 7): 3}[gate_size]
        backward = (grad, grad, grad if two else None, x, branch, gate, shift, shift if two else None, args[7], None)
        args = (*backward, mean, rstd, "layer", [layout, 2, 2, 0, 0], True)
        torch.library.opcheck(ops.gate_residual_norm_modulate_backward.default, args, test_utils=utilities)
        args = (None, *backward[1:4], None, None, *backward[6:], mean, rstd, "layer", [0, 2, 2, 0, 0], False)
        torch.library.opcheck(ops.gate_residual_norm_modulate_backward.default, args, test_utils=utilities)


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_compile(numerics):
    torch._dynamo.reset()
    for norm, names in [("layer", NAMES[3]), ("rms", NAMES[4]), ("layer", NAMES[2])]:
        a = arguments((2, 6, 20), names, dtype=torch.bfloat16)
        compiled = torch.compile(lambda *t, norm=norm: fused(Arguments(*t), norm, numerics=numerics), fullgraph=True)
        result = values_and_gradients(lambda a, f=compiled: f(*[getattr(a, n) for n in a.__dataclass_fields__]), a)
        assert_same(result, values_and_gradients(lambda a, norm=norm: fused(a, norm, numerics=numerics), a))


def test_saved_memory():
    """Two numbers a row beside the arguments; without a gate the residual stands for x and branch."""
    for names in NAMES:
        a = arguments((2, 64, 96), names, dtype=torch.bfloat16)
        tensors = [t.requires_grad_() for t in a.tensors().values()]
        assert saved_bytes(lambda a=a, tensors=tensors: (fused(a), tensors)) == 2 * 4 * 2 * 64
        assert saved_bytes(lambda a=a, tensors=tensors: (expression(a), tensors)) > 2 * 4 * 2 * 64 or names == "branch"


@settings(max_examples=40)
@given(
    shape=st.sampled_from([(2, 5, 7), (3, 300, 24), (2, 3, 4, 33), (5, 16), (2, 1, 384)]),
    kinds=st.tuples(st.sampled_from(sorted(SHAPES)), st.sampled_from(sorted(SHAPES))),
    names=st.sampled_from(NAMES),
    norm=st.sampled_from(["layer", "rms"]),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
)
def test_eager_numerics_equal_the_expression(shape, kinds, names, norm, dtype, threads):
    torch.set_num_threads(threads)
    a = arguments(shape, names, kinds[0], dtype)
    a.gate = None if a.gate is None else arguments(shape, "gate", kinds[1], dtype).gate
    expected = values_and_gradients(lambda a: expression(a, norm), a)
    assert_same(values_and_gradients(lambda a: fused(a, norm, numerics="eager"), a), expected)


def test_eager_numerics_of_a_stack():
    """Two blocks on one residual stream: gradients meet in the order in which autograd adds those of the expression."""
    for norm, dtype in itertools.product(("layer", "rms"), DTYPES):
        first = arguments((2, 9, 24), "branch gate shift scale", dtype=dtype)
        second = arguments((2, 9, 24), "gate shift scale", dtype=dtype, seed=1)
        names = [*first.tensors(), *("gate", "shift", "scale")]

        def stack(chain, tensors, names=names, norm=norm):
            a = Arguments(**dict(zip(names[:5], tensors[:5], strict=True)))
            residual, y = chain(a, norm)
            return chain(Arguments(residual, torch.tanh(y), *tensors[5:]), norm)

        results = []
        for chain in (lambda a, norm: fused(a, norm, numerics="eager"), expression):
            tensors = [*first.tensors().values(), *second["gate shift scale"]]
            tensors = [t.detach().requires_grad_() for t in tensors]
            outputs = stack(chain, tensors)
            grads = [torch.ones_like(o) for o in outputs]
            results.append([*(o.detach() for o in outputs), *torch.autograd.grad(outputs, tensors, grads)])
        assert_same(*results)


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_reference(numerics):
    for dtype, names in itertools.product(DTYPES, NAMES):
        a = arguments((2, 9, 33), names, dtype=dtype)
        result = fused(a, numerics=numerics, backend="reference")
        if numerics == "eager":
            assert_same(result, expression(a))
            continue
        for y, exact in zip(result, expression(a.to(torch.float64)), strict=True):
            assert y.dtype == dtype
            assert (y.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_bad_arguments():
    x = torch.randn(2, 3, 4)
    cases = [
        (ValueError, r"branch: expected shape \[2, 3, 4\] to match x .* got \[2, 4\]", {"branch": x[:, 0]}),
        (TypeError, "branch: expected a tensor of float32 or .* got int", {"branch": 1}),
        (ValueError, r"gate: expected shape \[4\] or \[2, 4\] or .* got \[3, 4\]", {"gate": x[0]}),
        (ValueError, r"shift: expected shape .* got \[2, 2, 4\]", {"shift": x[:, :2]}),
        (ValueError, "norm: expected one of layer, rms, got None", {"norm": None}),
        (ValueError, r"bias: expected shape \[4\] to match x .* got \[1\]", {"bias": torch.ones(1)}),
    ]
    for error, message, changed in cases:
        with pytest.raises(error, match=message):
            vqkernels.gate_residual_norm_modulate(**{"x": x, "branch": x} | changed)
    with pytest.raises(RuntimeError, match="branch has an unexpected shape"):
        ops.gate_residual_norm_modulate(x, x[:, :1], None, None, None, None, None, None, None, "layer", 1e-6, False)
