"""Modulated norms and their gradients: against float64, and against torch's expression, bit for bit where promised."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modulation_cases import (
    DTYPES,
    HALVES,
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

NAMES = ("", "shift scale", "scale", "weight bias", "shift scale weight", "shift scale shift2 scale2 weight bias")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("names", NAMES)
def test_values_and_gradients(names, norm, dtype):
    for i, shape in enumerate([(2, 33, 7), (3, 1, 64), (2, 255, 65), (1, 70, 1152)]):
        assert_accurate(several(shape, names, dtype=dtype, seed=i), norm)


@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 4097, 16), (1, 9, 3072), (5, 384), (2, 3, 4, 5, 17)])
@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_of_modulations(shape, kind):
    assert_accurate(several(shape, "shift scale weight", kind))


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
    a.shift = None if a.shift is None else arguments(shape, "shift", kinds[1], dtype).shift
    results = []
    for level, threads in itertools.product(LEVELS, (1, 3)):
        torch.set_num_threads(threads)
        with cpu_level(level):
            results.append(values_and_gradients(lambda a: fused(a, norm), a))
    for result in results:
        assert_same(result, results[0])


def test_many_rows_in_threads():
    """More chunks than threads, chunks of several runs, and batch items of few rows."""
    for shape in [(2, 5000, 48), (700, 3, 48), (3000, 48)]:
        a = arguments(shape, "shift scale weight bias", "B,D" if shape[0] < 3000 else "D")
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(values_and_gradients(fused, a))
        assert_same(results[1], results[0])
        assert_same(results[2], results[0])
        assert_accurate([a])


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("kind", ["D", "B,D", "B,L,D"])
def test_gradcheck(norm, kind):
    a = arguments((2, 3, 5), "shift scale shift2 scale2 weight bias", kind, torch.float64)
    names = list(a.tensors())
    inputs = [t.requires_grad_() for t in a.tensors().values()]
    call = lambda *t: tuple(fused(Arguments(**dict(zip(names, t, strict=True))), norm))  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)


def test_views_are_read_as_they_are():
    """Chunks of a modulation, transposed and expanded rows, a last dimension that is not dense."""
    x = torch.randn(4, 6, 40)
    modulation = torch.randn(4, 6 * 20)
    shift, scale = modulation.chunk(6, 1)[2:4]
    views = {
        "sliced": x[:, 1:5, 10:30],
        "transposed": x[..., :20].transpose(0, 1)[:4],
        "every other": x[..., ::2],
        "expanded": x[:1, :, :20].expand(4, 6, 20),
        "one row": x[:, :1, :20].expand(4, 6, 20),
    }
    for view in views.values():
        a = Arguments(view, shift=shift, scale=scale)
        dense = Arguments(view.contiguous(), shift=shift.contiguous(), scale=scale.contiguous())
        assert_same(values_and_gradients(fused, a), values_and_gradients(fused, dense))
    image = torch.randn(2, 20, 3, 5).to(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    assert_accurate([Arguments(image, shift=shift[:2], scale=scale[:2])])
    grad = torch.randn(1, 1, 20).expand(4, 6, 20)
    x = torch.randn(4, 6, 20, requires_grad=True)
    of_view, of_copy = (
        torch.autograd.grad(vqkernels.norm_modulate(x, shift, scale), x, g) for g in (grad, grad.contiguous())
    )
    assert_same(of_view, of_copy)


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (0, 8)])
@pytest.mark.parametrize("kind", ["D", "B,D", "B,L,D"])
def test_empty(shape, kind):
    a = arguments(shape, "shift scale weight bias", kind)
    assert_same(values_and_gradients(fused, a), values_and_gradients(expression, a))


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_rows_far_from_zero(offset):
    for dim in (7, 384, 1152):
        assert_accurate(several((2, 9, dim), "shift scale", offset=offset))


def test_one_plus_scale_is_not_rounded():
    """A scale of 2^-10 is lost in bfloat16's 1 + scale; here it reaches the result."""
    x = torch.tensor([[[1.0, -1.0] * 8]], dtype=torch.bfloat16) * 1.0
    shift = torch.full((16,), -1.0, dtype=torch.bfloat16)
    y = vqkernels.norm_modulate(x, shift, torch.full((16,), 2.0**-10, dtype=torch.bfloat16), eps=0)
    assert torch.equal(y[0, 0, ::2], torch.full((8,), 2.0**-10, dtype=torch.bfloat16))


def test_overflow_of_float16():
    """Inf where the exact result rounds to Inf, and nowhere else, though 1 + scale of a product may not fit."""
    a = arguments((2, 40, 33), "shift scale", dtype=torch.float16)
    a.scale = a.scale * 30000
    a.shift = -a.shift * 30000
    truth = expression(a.to(torch.float64))[0].to(torch.float16)
    y = fused(a)[0]
    assert truth.isinf().any()
    assert truth.isfinite().any()
    assert torch.equal(y.isinf(), truth.isinf())
    assert not y.isnan().any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_row_stays_alone(level, bad):
    a = arguments((2, 40, 17), "shift scale weight bias")
    with cpu_level(level):
        whole = values_and_gradients(fused, a)
        a.x[1, 7, 3] = bad
        broken = values_and_gradients(fused, a)
        plain = values_and_gradients(expression, a)
    rest = torch.ones(2, 40, dtype=torch.bool)
    rest[1, 7] = False
    for result, before, reference in zip(broken, whole, plain, strict=True):
        assert torch.equal(result.isnan(), reference.isnan())
        if result.shape == a.x.shape:
            assert same_bits(result[rest], before[rest])
            assert result[1, 7].isnan().all()


def test_infinite_scales():
    """Absent parameters take no part: no 0 * Inf."""
    a = arguments((2, 5, 17), "shift scale")
    a.scale[0, 3] = torch.inf
    a.shift[1, 2] = -torch.inf
    for actual, plain in zip(fused(a), expression(a), strict=True):
        assert torch.equal(actual.isnan(), plain.isnan())
        assert torch.equal(actual.isinf(), plain.isinf())


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("used", [0, 1])
def test_the_result_not_in_use_has_no_part_in_gradients(used, numerics):
    a = arguments((2, 9, 17), "shift scale shift2 scale2")
    (a.scale2 if used == 0 else a.scale)[0, 3] = torch.inf
    outcomes = []
    for call in (expression, lambda a: fused(a, numerics=numerics)):
        leaves = Arguments(**{name: t.detach().requires_grad_() for name, t in a.tensors().items()})
        outcomes.append(torch.autograd.grad(call(leaves)[used].sum(), leaves.tensors().values(), allow_unused=True))
    assert [grad is None for grad in outcomes[0]] == [grad is None for grad in outcomes[1]]
    for expected, actual in zip(*outcomes, strict=True):
        if expected is not None:
            assert expected.isfinite().all()
            assert numerics == "fp32" or same_bits(actual, expected)
            assert (actual - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float64")])
def test_mixed_dtypes(dtypes):
    x_dtype, other = (getattr(torch, name) for name in dtypes)
    a = arguments((2, 40, 33), "shift scale", dtype=other)
    a.x = a.x.to(x_dtype)
    a.weight = torch.randn(33)
    a.bias = torch.randn(33)
    actual = values_and_gradients(fused, a)
    wide = a.to(torch.float64)
    truth = values_and_gradients(expression, wide, grad_dtype=actual[0].dtype)
    for result, exact, dtype in zip(
        actual,
        truth,
        [torch.promote_types(x_dtype, other), x_dtype, other, other, torch.float32, torch.float32],
        strict=True,
    ):
        assert result.dtype == dtype
        error = (result.double() - exact).abs().max() / exact.abs().max()
        assert error <= 2 * torch.finfo(dtype).eps + (
            0 if torch.float64 == dtype else 2 * torch.finfo(torch.float32).eps
        )


def test_parameters_wider_than_the_arithmetic():
    """A float64 weight does not widen the arithmetic; its gradient is the float32 one."""
    a = arguments((2, 40, 33), "shift scale")
    a.weight, a.bias = torch.randn(33, dtype=torch.float64), torch.randn(33, dtype=torch.float64)
    actual = values_and_gradients(fused, a)
    truth = values_and_gradients(expression, a.to(torch.float64), grad_dtype=actual[0].dtype)
    for result, exact in zip(actual, truth, strict=True):
        assert (result.double() - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_results_can_be_modified():
    """They are no views of what an autograd function made."""
    x = torch.randn(2, 3, 4, 8, requires_grad=True)
    for y in (vqkernels.norm_modulate(x), vqkernels.gate_residual(x, x)):
        y.mul_(2).sum().backward()
        assert x.grad.isfinite().all()


def test_autocast():
    """Under autocast the dtypes are those of torch's expression."""
    a = arguments((2, 6, 20), "shift scale", dtype=torch.bfloat16)
    a.x = a.x.float()
    with torch.autocast("cpu", torch.bfloat16):
        for call in (a, Arguments(a.x.bfloat16()), Arguments(a.x)):
            assert fused(call)[0].dtype == fused(call, numerics="eager")[0].dtype == expression(call)[0].dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    for norm, kind, two in [("layer", (2, 1), True), ("rms", (1, 1), False), ("layer", (2, 5), False)]:
        x, grad = torch.randn(2, 5, 7).to(dtype), torch.randn(2, 5, 7).to(dtype)
        shift, scale = torch.randn(2, *kind, 7).to(dtype)
        weight = torch.randn(7).to(dtype)
        args = (x, shift, scale, None, scale if two else None, weight, None, norm, 1e-5, two)
        torch.library.opcheck(ops.norm_modulate.default, args, test_utils=utilities)
        torch.library.opcheck(ops.norm_modulate_eager.default, args, test_utils=utilities)
        backward = (grad, grad if two else None, *args[:-1], [True, False, True, True, True])
        torch.library.opcheck(ops.norm_modulate_eager_backward.default, (None, *backward), test_utils=utilities)
        torch.library.opcheck(ops.norm_modulate_eager_backward.default, (grad, *backward), test_utils=utilities)
        y, _, mean, rstd = ops.norm_modulate(*args)
        assert y.dtype == dtype
        layout = {(2, 1): 2, (1, 1): 1, (2, 5): 3}[kind]
        backward = (grad, grad if two else None, x, scale, scale if two else None, weight, None, mean, rstd, norm)
        options = ([layout, layout, 0, layout if two else 0], True)
        torch.library.opcheck(ops.norm_modulate_backward.default, (*backward, *options), test_utils=utilities)


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_compile(numerics):
    """One graph, for other lengths too; what comes out is what comes out without the compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: fused(Arguments(*t), numerics=numerics), fullgraph=True, dynamic=True)
    for dtype, length in itertools.product((torch.float32, torch.bfloat16), (6, 9)):
        a = arguments((2, length, 20), "shift scale shift2 scale2 weight", dtype=dtype)
        result = values_and_gradients(lambda a: compiled(*[getattr(a, n) for n in a.__dataclass_fields__]), a)
        assert_same(result, values_and_gradients(lambda a: fused(a, numerics=numerics), a))


def test_saved_memory():
    """Two numbers a row beside the arguments."""
    for dtype in (torch.float32, torch.bfloat16):
        a = arguments((2, 64, 96), "shift scale shift2 scale2 weight bias", dtype=dtype)
        tensors = [t.requires_grad_() for t in a.tensors().values()]
        assert saved_bytes(lambda a=a, tensors=tensors: (fused(a), tensors)) == 2 * 4 * 2 * 64
        assert saved_bytes(lambda a=a, tensors=tensors: (fused(a, "rms"), tensors)) == 4 * 2 * 64
        assert saved_bytes(lambda a=a, tensors=tensors: (expression(a), tensors)) > a.x.nbytes


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
    a.shift = None if a.shift is None else arguments(shape, "shift", kinds[1], dtype).shift
    expected = values_and_gradients(lambda a: expression(a, norm), a)
    assert_same(values_and_gradients(lambda a: fused(a, norm, numerics="eager"), a), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_eager_numerics_differ_from_fp32(dtype):
    a = arguments((2, 30, 64), "shift scale", dtype=dtype)
    assert not same_bits(fused(a)[0], fused(a, numerics="eager")[0])


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_reference(norm, numerics):
    for dtype in DTYPES:
        a = arguments((2, 9, 33), "shift scale shift2 scale2 weight bias", dtype=dtype)
        result = fused(a, norm, numerics=numerics, backend="reference")
        plain = expression(a, norm)
        if numerics == "eager":
            assert_same(result, plain)
        else:
            truth = expression(a.to(torch.float64), norm)
            for y, exact in zip(result, truth, strict=True):
                assert (y.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_bad_arguments():
    x = torch.randn(2, 3, 4)
    cases = [
        (TypeError, "x: expected a tensor of float32 or .* got int64 tensor of shape", {"x": torch.arange(4)}),
        (ValueError, r"x: expected shape \[B, ..., D\] with D at least 1, got \[4\]", {"x": x[0, 0]}),
        (ValueError, r"shift: expected shape \[4\] or \[2, 4\] or .* got \[3, 4\]", {"shift": x[0]}),
        (ValueError, r"scale: expected shape .* to match x of shape \[2, 3, 4\], got \[5\]", {"scale": torch.ones(5)}),
        (ValueError, r"second scale: expected shape .* got \[2, 2, 4\]", {"second": (None, x[:, :2])}),
        (TypeError, "second: expected None or a pair", {"second": x}),
        (ValueError, "norm: expected one of layer, rms, got 'batch'", {"norm": "batch"}),
        (ValueError, "numerics: expected one of fp32, eager, got 'fp16'", {"numerics": "fp16"}),
        (ValueError, r"weight: expected shape \[4\] to match x .* got \[3\]", {"weight": torch.ones(3)}),
        (ValueError, "eps: expected a number of at least 0, got -1", {"eps": -1}),
        (ValueError, "shift: expected device cpu to match x, got meta", {"shift": torch.ones(4, device="meta")}),
        (ValueError, "backend: expected None or one of", {"backend": "fast"}),
    ]
    for error, message, changed in cases:
        with pytest.raises(error, match=message):
            vqkernels.norm_modulate(**{"x": x} | changed)
    with pytest.raises(RuntimeError, match="scale has an unexpected shape"):
        ops.norm_modulate(x, None, x[:, :2], None, None, None, None, "layer", 1e-6, False)
