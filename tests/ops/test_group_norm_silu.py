"""Group normalisation with SiLU: values and gradients against float64, one result on every instruction set."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from vq_cases import DTYPES, LEVELS, cpu_level, same_bits

import vqkernels
from vqkernels import group_norm_silu


def expression(x, groups, weight, bias, eps=1e-6, activation="silu"):
    normed = torch.group_norm(x, groups, weight, bias, eps)
    return F.silu(normed) if activation == "silu" else normed


def with_gradients(norm, x, weight, bias, grad, dtype):
    """What norm(x, weight, bias) returns, and the gradients of what is not None."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
    y = norm(*leaves)
    gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(dtype)))
    return y.detach(), *(None if t is None else next(gradients) for t in leaves)


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def make_inputs(shape, dtype=torch.float32, affine=True, mean=0.0):
    x, grad = (torch.randn(shape) + mean).to(dtype), torch.randn(shape).to(dtype)
    if not affine:
        return x, None, None, grad
    return x, torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype), grad


def assert_right(x, groups, weight, bias, grad, **options):
    def ours(*tensors):
        return group_norm_silu(tensors[0], groups, *tensors[1:], **options)

    def plain(*tensors):
        return expression(tensors[0], groups, *tensors[1:], **options)

    actual = with_gradients(ours, x, weight, bias, grad, x.dtype)
    assert actual[0].stride() == torch.empty_like(x).stride()
    of_dtype = with_gradients(plain, x, weight, bias, grad, x.dtype)
    truth = with_gradients(plain, x, weight, bias, grad, torch.float64)
    assert_within_budget(actual, of_dtype, truth)
    return actual


SHAPES = [
    ((2, 128, 16, 16), 32),
    ((1, 512, 9, 7), 32),
    ((1, 6, 40, 33), 1),
    ((2, 7, 5), 7),
    ((1, 1, 255), 1),
    ((2, 40, 3, 4, 5), 8),
    ((1, 3, 70, 71), 3),
    ((5, 30), 10),
    ((2, 8, 1, 3), 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_values_and_gradients(shape, groups, dtype):
    for activation, affine in (("silu", True), ("none", True), ("silu", False)):
        x, weight, bias, grad = make_inputs(shape, dtype, affine)
        assert_right(x, groups, weight, bias, grad, activation=activation)
        assert_right(channels_last(x), groups, weight, bias, grad, activation=activation, eps=1e-3)


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_float64(shape, groups):
    """Against the same formula written out: both are off by some roundings of the largest terms."""
    x, weight, bias, grad = make_inputs(shape, torch.float64)

    def written_out(x, w, b):
        grouped = x.reshape(shape[0], groups, -1)
        d = grouped - grouped.mean(-1, keepdim=True)
        normed = (d / (d.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(shape)
        of_channels = (1, -1, *[1] * (len(shape) - 2))
        h = normed * w.reshape(of_channels) + b.reshape(of_channels)
        return h / (1 + (-h).exp())

    truth = with_gradients(written_out, x, weight, bias, grad, x.dtype)
    for value in (x, channels_last(x)):
        actual = with_gradients(lambda x, w, b: group_norm_silu(x, groups, w, b), value, weight, bias, grad, x.dtype)
        for result, exact in zip(actual, truth, strict=True):
            assert (result - exact).abs().max() <= 2.0**-52 * 40 * max(exact.abs().max(), 1)


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 5),
    group_channels=st.integers(1, 9),
    spatial=st.lists(st.integers(1, 40), min_size=0, max_size=2),
    last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(batch, groups, group_channels, spatial, last, dtype):
    """Few elements have no typical error of an expression: some roundings of the largest terms are allowed here."""
    x, weight, bias, grad = make_inputs((batch, groups * group_channels, *spatial), dtype)

    def plain(x, w, b):
        return expression(x, groups, w, b, eps=0.1)

    value = channels_last(x) if last and spatial else x
    actual = with_gradients(lambda x, w, b: group_norm_silu(x, groups, w, b, eps=0.1), value, weight, bias, grad, dtype)
    terms = grad.double().abs().movedim(1, 0).flatten(1).sum(1).max()
    largest = 1 + x.abs().max() + weight.abs().max() + bias.abs().max()
    for result, exact in zip(actual, with_gradients(plain, x, weight, bias, grad, torch.float64), strict=True):
        scale = largest**2 * (terms if exact.ndim == 1 else 1 + grad.abs().max())
        assert ((result - exact).abs() <= 2.0**-24 * 16 * scale + torch.finfo(dtype).eps * exact.abs()).all()


@pytest.mark.parametrize("last", [False, True])
def test_large_mean(last):
    """The statistics keep what a mean of 1e4 leaves of float32; one sum of squares would lose it all."""
    x, weight, bias, grad = make_inputs((2, 16, 30, 31), mean=1e4)
    x[0, 0, 0, 0] = 0  # far from the mean, and the first of all
    x = channels_last(x) if last else x
    y, *_ = assert_right(x, 4, weight, bias, grad)
    truth = expression(x.double(), 4, weight.double(), bias.double())
    # The float64 statistics of what float32 holds: of the mean, nothing is left in the error.
    assert (y - truth).abs().max() <= 2.0**-24 * 8 * truth.abs().max()
    one = group_norm_silu(torch.full_like(x, 1e4), 4, activation="none")
    assert torch.equal(one, torch.zeros_like(x))


@pytest.mark.parametrize("last", [False, True])
def test_huge_values(last):
    """Where the squares overflow the variance is infinite and the bias alone is left; nothing becomes NaN."""
    x, weight, bias, _ = make_inputs((1, 4, 30, 30))
    x = channels_last(x) if last else x
    y = group_norm_silu(x * 1e15, 2, weight, bias)
    truth = expression((x * 1e15).double(), 2, weight.double(), bias.double())
    assert_within_budget(y, expression(x * 1e15, 2, weight, bias), truth)
    for scale in (1e25, 1e37):
        y = group_norm_silu(x * scale, 2, weight, bias)
        assert torch.equal(y, group_norm_silu(x * 0, 2, weight, bias))


def test_broken_values_stay_in_their_group():
    for value, last, shape in itertools.product((torch.nan, torch.inf), (False, True), ((2, 8, 5, 7), (2, 64, 9))):
        x, weight, bias, grad = make_inputs(shape)
        x[1, 1].view(-1)[4] = value
        x = channels_last(x) if last else x
        y, gx, gw, gb = with_gradients(lambda x, w, b: group_norm_silu(x, 4, w, b), x, weight, bias, grad, x.dtype)
        width = shape[1] // 4
        for t in (y, gx):
            assert t[1, :width].isnan().all()
            assert t[1, width:].isfinite().all()
            assert t[0].isfinite().all()
        assert gw[:width].isnan().all()
        assert gb[:width].isnan().all()
        assert gw[width:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), [((3, 48, 5, 29), 3), ((1, 12, 70, 131), 1), ((2, 33, 40), 33)])
def test_one_result_for_all_levels_and_threads(shape, groups, last, dtype):
    x, weight, bias, grad = make_inputs(shape, dtype)
    x = channels_last(x) if last else x
    results = []
    for level, threads in itertools.product(LEVELS, (1, 2, 5)):
        torch.set_num_threads(threads)
        with cpu_level(level):
            results.append(
                with_gradients(lambda x, w, b: group_norm_silu(x, groups, w, b), x, weight, bias, grad, dtype)
            )
    for result in results[1:]:
        assert all(map(same_bits, result, results[0]))


def test_samples_are_independent():
    for last in (False, True):
        x, weight, bias, _ = make_inputs((3, 32, 21, 22))
        x = channels_last(x) if last else x
        whole = group_norm_silu(x, 8, weight, bias)
        for i in range(3):
            assert same_bits(whole[i : i + 1], group_norm_silu(x[i : i + 1], 8, weight, bias))


def test_views():
    """Strides are read as they are or copied away; the result has the order of the input's."""
    x, weight, bias, grad = make_inputs((4, 12, 10, 9))
    expected = with_gradients(lambda x, w, b: group_norm_silu(x, 3, w, b), x[::2], weight, bias, grad[::2], x.dtype)
    wide = torch.full((4, 24, 10, 18), torch.nan)
    wide[:, 6:18, :, ::2] = x
    views = [
        x[::2],
        channels_last(x)[::2],
        wide[::2, 6:18, :, ::2],
        x.transpose(2, 3).contiguous().transpose(2, 3)[::2],
    ]
    params = torch.stack([weight, bias], 1)
    for view in views:
        leaf = view.detach().requires_grad_()
        y = group_norm_silu(leaf, 3, params[:, 0], params[:, 1])
        torch.testing.assert_close(y, expected[0])
        for g in (grad[::2], channels_last(grad)[::2]):
            (gx,) = torch.autograd.grad(y, leaf, g, retain_graph=True)
            torch.testing.assert_close(gx, expected[1])
    constant = torch.randn(1, 12, 1, 1).expand(2, 12, 3, 3)
    torch.testing.assert_close(group_norm_silu(constant, 3), expression(constant, 3, None, None))
    ones = torch.autograd.grad(group_norm_silu(leaf, 3, weight, bias).sum(), leaf)[0]
    same = torch.autograd.grad(expression(leaf, 3, weight, bias).sum(), leaf)[0]
    torch.testing.assert_close(ones, same)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4), (0, 8)])
def test_empty(shape):
    x, weight, bias, grad = make_inputs(shape)
    y, gx, gw, gb = with_gradients(lambda x, w, b: group_norm_silu(x, 4, w, b), x, weight, bias, grad, x.dtype)
    assert y.shape == gx.shape == shape
    assert torch.equal(gw, torch.zeros(8))
    assert torch.equal(gb, torch.zeros(8))


def test_one_element_a_group():
    x, weight, bias, _ = make_inputs((3, 6))
    assert torch.equal(group_norm_silu(x, 6, weight, bias, activation="none"), bias.expand(3, 6))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_gradcheck(last, activation):
    x, weight, bias, _ = make_inputs((2, 6, 3, 2), torch.float64)
    x = channels_last(x) if last else x
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, b: group_norm_silu(x, 3, w, b, activation=activation), leaves, check_batched_grad=False
    )


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
def test_gradients_of_some(wanted):
    x, weight, bias, grad = make_inputs((2, 8, 5, 6))
    everything = [t.clone().requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(group_norm_silu(everything[0], 2, *everything[1:]), everything, grad)
    leaves = [t.clone().requires_grad_(w) for t, w in zip((x, weight, bias), wanted, strict=True)]
    group_norm_silu(leaves[0], 2, *leaves[1:]).backward(grad)
    for leaf, want, gradient in zip(leaves, wanted, expected, strict=True):
        assert (leaf.grad is not None) == want
        assert not want or same_bits(leaf.grad, gradient)


def test_parameters_of_another_dtype():
    x, weight, bias, grad = make_inputs((2, 8, 50))
    narrow = x.bfloat16()
    leaves = [narrow.requires_grad_(), weight.requires_grad_(), bias.double().requires_grad_()]
    y = group_norm_silu(leaves[0], 2, *leaves[1:])
    gradients = torch.autograd.grad(y, leaves, grad.bfloat16())
    assert [t.dtype for t in (y, *gradients)] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float64]
    truth = expression(narrow.double(), 2, weight.double(), bias.double())
    assert ((y - truth).abs() <= torch.finfo(torch.bfloat16).eps * (truth.abs() + 0.01)).all()


def test_backward_keeps_the_input_and_two_numbers_a_group():
    x, weight, bias, _ = make_inputs((3, 16, 10, 10))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        group_norm_silu(x.requires_grad_(), 4, weight, bias)
    assert sum(t.numel() for t in saved) == x.numel() + weight.numel() + bias.numel() + 2 * 3 * 4


@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 4, 3), (2, 6), (0, 6, 2)])
def test_opcheck(shape):
    ops = torch.ops.vqkernels
    x, weight, bias, grad = make_inputs(shape)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3) if x.ndim == 4 else x
    for value in (x, channels_last(x) if x.ndim > 2 else x, transposed):
        torch.library.opcheck(ops.group_norm_silu.default, (value, 3, weight, None, 1e-6, "silu"))
        _, mean, rstd = ops.group_norm_silu(value, 3, weight, bias, 1e-6, "none")
        arguments = (grad, value, weight, bias, mean, rstd, "none")
        torch.library.opcheck(ops.group_norm_silu_backward.default, arguments)


@pytest.mark.parametrize("last", [False, True])
def test_compile(last):
    x, weight, bias, grad = make_inputs((2, 8, 6, 5))
    x = channels_last(x) if last else x

    def norm(x, w, b):
        return group_norm_silu(x * 2, 4, w, b) + 1

    compiled = torch.compile(norm, fullgraph=True)
    expected = with_gradients(norm, x, weight, bias, grad, x.dtype)
    for actual, wanted in zip(with_gradients(compiled, x, weight, bias, grad, x.dtype), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_autocast_leaves_dtypes_as_the_expression_does():
    x = torch.randn(2, 8, 6)
    for value in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = group_norm_silu(value, 2), expression(value, 2, None, None)
        assert y.dtype == expected.dtype


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(2, 8, 3).int(), 2), {}, TypeError, "x: expected a tensor of float32"),
        ((torch.zeros(8), 2), {}, ValueError, r"x: expected shape \[B, C, ...\] with C at least 1, got \[8\]"),
        ((torch.zeros(2, 0, 3), 1), {}, ValueError, r"x: expected shape .* got \[2, 0, 3\]"),
        ((torch.zeros(2, 8), 3), {}, ValueError, "num_groups: expected a divisor of 8, the channels of x, got 3"),
        ((torch.zeros(2, 8), 0), {}, ValueError, "num_groups: expected an integer of at least 1, got 0"),
        ((torch.zeros(2, 8), 2, torch.zeros(7)), {}, ValueError, r"weight: expected shape \[8\]"),
        ((torch.zeros(2, 8), 2, None, torch.zeros(8, 1)), {}, ValueError, r"bias: expected shape \[8\]"),
        ((torch.zeros(2, 8), 2, [1]), {}, TypeError, "weight: expected a tensor"),
        ((torch.zeros(2, 8), 2), {"eps": -1e-6}, ValueError, "eps: expected a number of at least 0"),
        ((torch.zeros(2, 8), 2), {"activation": "gelu"}, ValueError, "activation: expected one of silu, none"),
        ((torch.zeros(2, 8), 2), {"backend": "cuda"}, ValueError, "backend: expected None or one of"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        group_norm_silu(*arguments, **options)


def test_direct_calls_are_safe():
    ops, x = torch.ops.vqkernels, torch.zeros(2, 8, 3)
    mean = torch.zeros(2, 2)
    for call in (
        lambda: ops.group_norm_silu(x, 3, None, None, 0.0, "silu"),
        lambda: ops.group_norm_silu(x, 0, None, None, 0.0, "silu"),
        lambda: ops.group_norm_silu(x[:, 0, 0], 1, None, None, 0.0, "silu"),
        lambda: ops.group_norm_silu(x, 2, mean, None, 0.0, "silu"),
        lambda: ops.group_norm_silu(x, 2, None, None, 0.0, "tanh"),
        lambda: ops.group_norm_silu_backward(x[:1], x, None, None, mean, mean, "silu"),
        lambda: ops.group_norm_silu_backward(x.double(), x, None, None, mean, mean, "silu"),
        lambda: ops.group_norm_silu_backward(x, x, None, None, mean, mean[:1], "silu"),
        lambda: ops.group_norm_silu_backward(x, x, None, None, mean[:1], mean[:1], "silu"),
        lambda: ops.group_norm_silu_backward(x, x, None, None, mean.double(), mean, "silu"),
    ):
        with pytest.raises(RuntimeError, match="vqkernels:"):
            call()


@pytest.mark.parametrize("last", [False, True])
def test_reference(last):
    x, weight, bias, grad = make_inputs((2, 8, 6, 5), torch.float16)
    x = channels_last(x) if last else x
    actual = with_gradients(
        lambda x, w, b: group_norm_silu(x, 4, w, b, backend="reference"), x, weight, bias, grad, x.dtype
    )
    assert actual[0].stride() == x.stride()
    of_dtype, truth = (
        with_gradients(lambda x, w, b: expression(x, 4, w, b), x, weight, bias, grad, d)
        for d in (x.dtype, torch.float64)
    )
    assert_within_budget(actual, of_dtype, truth)
    assert vqkernels.reference.group_norm_silu(x, 4).stride() == x.stride()
