"""What the tests of bias_gelu, swiglu and geglu share: data, the expression in PyTorch, what holds for all three."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from budget import assert_within_budget
from torch import Tensor
from vq_cases import LEVELS, cpu_level, same_bits

SHAPES = [(300, 1), (40, 7), (3, 5, 64), (2, 1, 384), (1, 255, 33), (2, 3, 4, 1152), (9, 3072), (4097, 20), (50,)]


class Operation(NamedTuple):
    """An operation with its options bound, and the expression that it stands for, as functions of x and bias."""

    fused: Callable[..., Tensor]  # also takes `backend`
    plain: Callable[[Tensor, Tensor | None], Tensor]
    halves: int  # rows of x hold so many numbers for one of the result

    def data(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Of the result's shape: x and bias."""
        generator = torch.Generator().manual_seed(seed + sum(shape))
        sizes = (*shape[:-1], self.halves * shape[-1])
        x, bias = (torch.randn(s, generator=generator) for s in (sizes, sizes[-1:]))
        return (2 * x).to(dtype), bias.to(dtype)


def with_gradients(
    function: Callable[..., Tensor], x: Tensor, bias: Tensor | None, grad: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """The value and the gradients of x and bias, all computed in `dtype`."""
    x, grad = (t if dtype is None else t.to(dtype) for t in (x, grad))
    bias = bias if bias is None or dtype is None else bias.to(dtype)
    leaves = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    y = function(*leaves) if bias is not None else function(leaves[0], None)
    gradients = list(torch.autograd.grad(y, leaves, grad.to(y.dtype)))
    return [y.detach(), *gradients, *[None] * (2 - len(leaves))]


def check(op: Operation, x: Tensor, bias: Tensor | None) -> None:
    """Value and gradients within the budget."""
    shape = (*x.shape[:-1], x.shape[-1] // op.halves)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(x.numel())).to(x.dtype)
    compare(op, x, bias, grad, with_gradients(op.fused, x, bias, grad))


def compare(op: Operation, x: Tensor, bias: Tensor | None, grad: Tensor, actual: list[Tensor | None]) -> None:
    expression = with_gradients(op.plain, x, bias, grad)
    truth = with_gradients(op.plain, x, bias, grad, torch.float64)
    if x.dtype == torch.float64:
        check_float64(actual, truth)
        return
    if bias is None or bias.numel() >= 64:
        assert_within_budget(actual, expression, truth)
        return
    # The largest of a few errors of sums is a matter of luck: the terms, each rounded some times, bound the error.
    assert_within_budget(actual[:2], expression[:2], truth[:2])
    factors = [grad.double().abs()] * op.halves
    if op.halves == 2:
        first, second = (x.double() + bias.double()).abs().chunk(2, -1)
        factors = [factors[0] * (1 + second), factors[1] * (1 + first)]
    terms = torch.cat(factors, -1).reshape(-1, x.shape[-1]).sum(0)
    bound = 4 * torch.finfo(torch.float32).eps * terms + torch.finfo(bias.dtype).eps * truth[2].abs()
    assert ((actual[2].double() - truth[2]).abs() <= bound).all()


def check_float64(actual: list[Tensor | None], expression: list[Tensor | None]) -> None:
    """Both are a few roundings of their largest terms away from the truth."""
    for ours, theirs in zip(actual, expression, strict=True):
        if theirs is not None:
            assert ours.dtype == torch.float64
            assert ((ours - theirs).abs() <= 16 * 2.0**-52 * theirs.abs().max()).all()


def check_invariances(op: Operation) -> None:
    """Bitwise the same from run to run, for any number of threads and on every instruction set."""
    for dtype, shape in ((torch.float32, (3, 700, 33)), (torch.bfloat16, (300, 37)), (torch.float64, (70, 2, 20))):
        x, bias = op.data(shape, dtype)
        x.view(-1)[::97] *= 20  # tails
        grad = torch.randn(shape).to(dtype)
        expected = with_gradients(op.fused, x, bias, grad)
        for level, threads in itertools.product(LEVELS, (1, 2, 3)):
            torch.set_num_threads(threads)
            with cpu_level(level):
                actual = with_gradients(op.fused, x, bias, grad)
            assert all(map(same_bits, actual, expected))


def check_views(op: Operation) -> None:
    """Strided, transposed, expanded and channels-last inputs and gradients: the results of dense ones, to the bit."""
    x, bias = op.data((4, 6, 24))
    grad = torch.randn(4, 6, 24)
    columns = x.shape[-1]
    expected = with_gradients(op.fused, x, bias, grad)

    wide = torch.randn(4, 8, columns + 9)
    wide[:, 1:7, 5 : columns + 5] = x
    grads = torch.randn(4, 6, 2, 24)
    grads[:, :, 1] = grad
    biases = torch.randn(columns, 3)
    biases[:, 1] = bias
    transposed = x.mT.contiguous().mT
    for view, of_grad in ((wide[:, 1:7, 5 : columns + 5], grads[:, :, 1]), (transposed, grad.mT.contiguous().mT)):
        assert not view.is_contiguous()
        assert all(map(same_bits, with_gradients(op.fused, view, biases[:, 1], of_grad), expected))

    row, item = x[:1, :1], x[:1]
    for view in (row.expand(4, 6, columns), item.expand(4, 6, columns), x.transpose(0, 1)):
        of_grad = torch.ones(()).expand(*view.shape[:-1], 24)
        wanted = with_gradients(op.fused, view.contiguous(), bias, of_grad.contiguous())
        assert all(map(same_bits, with_gradients(op.fused, view, bias, of_grad), wanted))

    image = op.data((2, 5, 6, 12))[0]
    channels_last = image.contiguous(memory_format=torch.channels_last)
    assert same_bits(op.fused(channels_last, None), op.fused(image, None))


def check_no_copies(op: Operation) -> None:
    """Rows of any stride whose columns lie side by side are read where they are."""

    def copies(x: Tensor) -> int:
        x = x.detach().requires_grad_()
        with torch.profiler.profile() as profile:
            op.fused(x, None).backward(torch.ones(*x.shape[:-1], x.shape[-1] // op.halves))
        return sum(event.count for event in profile.key_averages() if event.key in ("aten::copy_", "aten::clone"))

    x = torch.randn(4, 8, 100)
    assert copies(x[:, 1:7, 7:71]) == 0
    assert copies(x[:, 1:7, 7:71].mT) > 0  # the measurement sees what it should


def check_empty(op: Operation) -> None:
    for shape in ((0, 8), (3, 0, 8), (0, 4, 8)):
        x, bias = op.data(shape)
        y, grad_x, grad_bias = with_gradients(op.fused, x, bias, torch.ones(shape))
        assert y.shape == shape
        assert grad_x.shape == x.shape
        assert same_bits(grad_bias, torch.zeros_like(bias))


def special_values() -> Tensor:
    """Inf, NaN, zeros, subnormal numbers, overflow, and all magnitudes between, of both signs."""
    largest = torch.finfo(torch.float32).max
    magnitudes = torch.cat([torch.logspace(-46, 38, 800, dtype=torch.float64), torch.linspace(0, 120, 2401).double()])
    values = torch.cat([magnitudes.float(), torch.tensor([torch.inf, torch.nan, largest, 0.0])])
    return torch.cat([values, -values])


def check_special_values(op: Operation) -> None:
    """NaN only where the expression has NaN; otherwise infinite only where it is infinite."""
    values = special_values()
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x = values.to(dtype).unsqueeze(-1).repeat(1, op.halves)
        for filled in range(op.halves):
            x[:, :filled] = 1.5  # in the last round the second half alone is special
            grad = torch.ones(len(x), 1, dtype=dtype)
            actual, expression = (with_gradients(f, x, None, grad) for f in (op.fused, op.plain))
            truth = with_gradients(op.plain, x, None, grad, torch.float64)
            largest = x.double().abs().amax(-1, keepdim=True)
            for ours, theirs, exact in zip(actual[:2], expression[:2], truth[:2], strict=True):
                assert not (ours.isnan() & ~theirs.isnan()).any()
                assert not (ours.isinf() & theirs.isfinite()).any()
                # What decides is the rounding of the activation's argument, of the order of x^3 in places.
                terms = 8 * 2.0**-23 * (1 + largest.clamp(max=32) ** 2) * (1 + exact.abs() / (1 + largest))
                error = (ours.double() - exact).abs()
                ordinary = ours.isfinite() & (largest < 1e4)
                assert (error <= torch.finfo(dtype).eps * exact.abs() + terms)[ordinary].all()


def check_dtypes(op: Operation) -> None:
    """Where x and bias differ, the result has the dtype they promote to and each gradient that of its tensor."""
    for of_x, of_bias in itertools.permutations((torch.float32, torch.bfloat16, torch.float16, torch.float64), 2):
        x, bias = op.data((20, 64), of_x)[0], op.data((20, 64), of_bias)[1]
        grad = torch.randn(20, 64)
        actual, expression = (with_gradients(f, x, bias, grad) for f in (op.fused, op.plain))
        assert [t.dtype for t in actual] == [t.dtype for t in expression]
        truth = with_gradients(op.plain, x, bias, grad, torch.float64)
        if torch.float64 in (of_x, of_bias):
            for ours, theirs, exact in zip(actual, expression, truth, strict=True):
                rounding = torch.finfo(theirs.dtype).eps * (exact.abs() + torch.finfo(theirs.dtype).smallest_normal)
                assert ((ours.double() - exact).abs() <= rounding + 16 * 2.0**-52 * exact.abs().max()).all()
        else:
            assert_within_budget(actual, expression, truth)
    x, bias = op.data((20, 64))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert op.fused(x, bias).dtype == op.plain(x, bias).dtype


def check_gradients(op: Operation) -> None:
    x, bias = op.data((3, 4, 5), torch.float64)
    leaves = (x.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(op.fused, leaves)
    assert torch.autograd.gradcheck(lambda x: op.fused(x, None), leaves[:1])

    x, bias = op.data((6, 8))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        op.fused(x.requires_grad_(), bias.requires_grad_())
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), bias.data_ptr()}  # and nothing that was computed

    for shape in ((8,), (6, 8), (2, 3, 8), (2, 3, 2, 8)):  # results may be modified in place
        leaf, addend = op.data(shape)
        (grad,) = torch.autograd.grad(op.fused(leaf.requires_grad_(), addend).mul_(2).sum(), leaf)
        assert same_bits(grad, torch.autograd.grad(2 * op.fused(leaf, addend).sum(), leaf)[0])

    frozen = bias.detach()
    assert same_bits(*(torch.autograd.grad(op.fused(x, b).sum(), x)[0] for b in (bias, frozen)))
    x = x.detach()
    (grad_bias,) = torch.autograd.grad(op.fused(x, bias).sum(), bias)
    assert same_bits(grad_bias, with_gradients(op.fused, x, bias, torch.ones(6, 8))[2])
    grad_x = torch.autograd.grad(op.fused(x.requires_grad_(), None).sum(), x, create_graph=True)[0]
    assert not grad_x.requires_grad or _refuses(grad_x)


def _refuses(grad: Tensor) -> bool:
    try:
        grad.sum().backward()
    except RuntimeError as error:
        return "once_differentiable" in str(error)
    return False


def opcheck_samples(op: Operation) -> Iterator[tuple[Tensor, Tensor | None, Tensor, bool]]:
    """Yields x [B, L, D], bias, the gradient of the result, and whether that of the bias is wanted."""
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16), ((2, 5, 8), (1, 0, 3), (3, 1, 1))):
        x, bias = op.data(shape, dtype)
        yield x, bias, torch.randn(shape).to(dtype), True
        yield x, bias.float(), torch.randn(shape), False
        yield x, None, torch.randn(shape).to(dtype), False


def check_schemas(op: Operation, name: str, *options: str) -> None:
    """No test of autograd registration: gradients live in an autograd.Function around the operations."""
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    forward, backward = (getattr(torch.ops.vqkernels, n).default for n in (name, f"{name}_backward"))
    for x, bias, grad, wanted in opcheck_samples(op):
        torch.library.opcheck(forward, (x, bias, *options), test_utils=utilities)
        torch.library.opcheck(backward, (grad, x, bias, *options, wanted), test_utils=utilities)


def check_compiles(op: Operation) -> None:
    """In one graph, forward and backward, for changing sizes."""
    compiled = torch.compile(lambda x, bias: op.fused(x, bias), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 8):
        x, bias = op.data((rows, 2, 12))
        grad = torch.randn(rows, 2, 12)
        actual, expected = (with_gradients(f, x, bias, grad) for f in (compiled, op.fused))
        assert all(map(same_bits, actual, expected))


def refused(call: Callable[..., object], *args: object) -> bool:
    try:
        call(*args)
    except (RuntimeError, ValueError, TypeError):
        return True
    return False


def check_direct_calls(op: Operation, name: str, *options: str) -> None:
    """What memory safety needs is checked by the operation itself."""
    forward, backward = (getattr(torch.ops.vqkernels, n) for n in (name, f"{name}_backward"))
    check_refusals(op, forward, backward, options, "cpu")
    x, bias = op.data((2, 3, 4))
    grad = torch.randn(2, 3, 4)
    wider = backward(grad.double(), x, bias, *options, True)
    assert all(map(same_bits, wider, backward(grad, x, bias, *options, True)))


def check_refusals(
    op: Operation,
    forward: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, Tensor]],
    options: tuple[str, ...],
    device: str,
) -> None:
    x, bias = (t.to(device) for t in op.data((2, 3, 4)))
    grad = torch.randn(2, 3, 4, device=device)
    assert not refused(forward, x, bias, *options)
    assert not refused(backward, grad, x, bias, *options, True)
    for wrong in (x[0], x.unsqueeze(0), x[..., :0], x.int()):
        assert refused(forward, wrong, None, *options)
        assert refused(backward, grad, wrong, None, *options, False)
    for wrong in (bias[:-1], bias[None], bias[:0], bias.long()):
        assert refused(forward, x, wrong, *options)
        assert refused(backward, grad, x, wrong, *options, True)
    for wrong in (grad[:1, :2], grad[..., :-1], grad[0], grad.long()):
        assert refused(backward, wrong, x, bias, *options, True)
    assert refused(backward, grad, x, None, *options, True)
    for i in range(len(options)):
        unknown = [*options[:i], "third", *options[i + 1 :]]
        assert refused(forward, x, bias, *unknown)
        assert refused(backward, grad, x, bias, *unknown, True)


def check_feed_forward_kernels(
    op: Operation, backward: Callable[..., tuple[Tensor, Tensor]], options: tuple[str, ...], device: str
) -> None:
    """Functions on [B, L, D] as the kernels have them: every dtype, sizes around those of tiles, and strides."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for shape in ((2, 3, 1), (3, 9, 7), (1, 20, 66), (1, 1, 1026), (0, 4, 5), (3, 0, 5)):
            x, bias = op.data(shape, dtype)
            grad = torch.randn(shape).to(dtype)
            wide, pairs = (
                torch.randn(shape[0], shape[1] + 2, x.shape[2] + 3).to(dtype),
                torch.randn(*shape, 2).to(dtype),
            )
            strided, of_grad = wide[:, 1 : shape[1] + 1, 2 : x.shape[2] + 2].to(device), pairs[..., 1].to(device)
            strided.copy_(x)
            of_grad.copy_(grad)
            for of_bias in (bias, None):
                placed = None if of_bias is None else of_bias.to(device)
                y = op.fused(strided, placed)
                grad_x, grad_bias = backward(of_grad, strided, placed, *options, of_bias is not None)
                assert y.is_contiguous()
                assert grad_x.is_contiguous()
                if of_bias is None:
                    assert grad_bias.numel() == 0
                actual = [y.cpu(), grad_x.cpu(), None if of_bias is None else grad_bias.cpu()]
                if x.numel():
                    compare(op, x, of_bias, grad, actual)
                else:
                    assert all(t is None or not t.any() for t in actual)
            again = backward(of_grad, strided, bias.to(device), *options, True)
            assert same_bits(again[1], backward(of_grad, strided, bias.to(device), *options, True)[1])
    x, bias = op.data((2, 3, 8), torch.bfloat16)
    y, mixed = op.fused(x.to(device), bias.float().to(device)), op.fused(x.float().to(device), bias.float().to(device))
    assert same_bits(y, mixed)  # widened exactly, in the dtype they promote to
