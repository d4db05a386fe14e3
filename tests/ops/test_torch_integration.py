"""The operations under opcheck, torch.compile, torch.export, autocast and fake tensors."""

import pytest
import torch
from vq_cases import same_bits

import vqkernels

ops = torch.ops.vqkernels


def samples():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for heads, rows, codes, dim in [(1, 7, 5, 4), (2, 0, 3, 8), (3, 20, 33, 1)]:
            z, codebook = torch.randn(heads, rows, dim).to(dtype), torch.randn(heads, codes, dim).to(dtype)
            mask = torch.rand(heads, rows) > 0.5
            indices = torch.randint(-1, codes, (heads, rows))
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            yield ops.nearest_code.default, (z, codebook, "cosine", mask)
            yield ops.vector_quantize.default, (z, codebook, "l2", None)
            yield (
                ops.vector_quantize_backward.default,
                (torch.randn_like(z), torch.ones((), dtype=wide), z, codebook, indices, torch.tensor(rows), "rotation"),
            )
            yield ops.vector_quantize_backward.default, (None, None, z, codebook, indices, torch.tensor(rows), "none")
            yield ops.code_statistics.default, (z, indices, codes)
            state = torch.randn(heads, codes, dim), torch.rand(heads, codes), torch.randn(heads, codes, dim)
            batch = torch.randint(0, 9, (heads, codes)), torch.randn(heads, codes, dim)
            yield ops.ema_update_.default, (*state, *batch, 0.9, 1e-5)


@pytest.mark.parametrize(
    "name", ["nearest_code", "vector_quantize", "vector_quantize_backward", "code_statistics", "ema_update_"]
)
def test_opcheck(name):
    """No test of autograd registration: gradients live in an autograd.Function around the operations."""
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    checked = 0
    for op, args in samples():
        if op.name() == f"vqkernels::{name}":
            torch.library.opcheck(op, args, test_utils=utilities)
            checked += 1
    assert checked >= 9


def call_all(z, codebook, mask, indices, state, gradient):
    """Every public function in one graph."""
    found, score = vqkernels.nearest_code(z, codebook, metric="cosine", mask=mask, return_score=True)
    result = vqkernels.vector_quantize(z, codebook, mask=mask, gradient=gradient, codebook_weight=0.5, statistics=True)
    counts, sums = vqkernels.code_statistics(z, indices, codebook.shape[0])
    vqkernels.ema_update_(*state, counts, sums, decay=0.9, eps=1e-5)
    return found, score, *result, counts, sums


def arguments(rows, codes=9, dim=6):
    generator = torch.Generator().manual_seed(rows)
    z, codebook = torch.randn(rows, dim, generator=generator), torch.randn(codes, dim, generator=generator)
    mask = torch.rand(rows, generator=generator) > 0.2
    indices = torch.randint(-1, codes, (rows,), generator=generator)
    state = codebook.clone(), torch.ones(codes), codebook.clone()
    return z.requires_grad_(), codebook.requires_grad_(), mask, indices, state


def outcome(function, rows, gradient):
    z, codebook, mask, indices, state = arguments(rows)
    outputs = function(z, codebook, mask, indices, state, gradient)
    (outputs[2].nan_to_num().square().sum() + outputs[4]).backward()
    return [t.detach() for t in (*outputs, *state, z.grad, codebook.grad)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation", "none"])
def test_compile(backend, gradient):
    torch._dynamo.reset()
    compiled = torch.compile(call_all, backend=backend, fullgraph=True)
    for actual, expected in zip(outcome(compiled, 20, gradient), outcome(call_all, 20, gradient), strict=True):
        assert_close(actual, expected)


@pytest.mark.slow
def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call_all, backend=counter, fullgraph=True, dynamic=True)
    for rows in (20, 33, 64):
        for actual, expected in zip(
            outcome(compiled, rows, "rotation"), outcome(call_all, rows, "rotation"), strict=True
        ):
            assert_close(actual, expected)
    assert counter.frame_count == 1


def assert_close(actual, expected):
    """What the kernels give is equal; the loss alone is scaled by code that a compiler may fuse."""
    if expected.ndim == 0:
        assert abs(actual - expected) <= 2 * torch.finfo(expected.dtype).eps * abs(expected)
    elif expected.is_floating_point() and expected.shape != (9, 6):
        assert same_bits(actual, expected)
    elif expected.is_floating_point():
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(actual, expected)


class Tokenizer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("codebook", torch.randn(9, 6))

    def forward(self, z):
        return vqkernels.nearest_code(z, self.codebook)


def test_export():
    model = Tokenizer()
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(model, (torch.randn(4, 6),), dynamic_shapes=({0: rows},))
    assert any(node.target == ops.nearest_code.default for node in program.graph.nodes)
    for n in (4, 50):
        z = torch.randn(n, 6)
        assert torch.equal(program.module()(z), model(z))


def test_decompositions_keep_the_mutation():
    """Functionalisation turns the in-place update into a functional call and writes its result back."""
    state = arguments(20)[4]
    expected = [t.detach().clone() for t in state]
    counts, sums = torch.ones(9, dtype=torch.int64), torch.ones(9, 6)

    def update(codebook, cluster_size, code_sum):
        vqkernels.ema_update_(codebook, cluster_size, code_sum, counts, sums, decay=0.9, eps=1e-5)
        return codebook + 1

    want = update(*expected)
    actual = [t.detach().clone() for t in state]
    assert torch.equal(torch.compile(update, backend="aot_eager", fullgraph=True)(*actual), want)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    z, codebook = torch.randn(20, 6).to(dtype).requires_grad_(), torch.randn(9, 6).requires_grad_()
    plain = vqkernels.vector_quantize(z, codebook, codebook_weight=1.0, statistics=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = vqkernels.vector_quantize(z, codebook, codebook_weight=1.0, statistics=True)
        indices = vqkernels.nearest_code(z, codebook)
    assert torch.equal(indices, plain.indices)
    for a, b in zip(result, plain, strict=True):
        assert same_bits(a.detach(), b.detach())
    grads = [torch.autograd.grad(r.loss + r.quantized.float().sum(), [z, codebook]) for r in (plain, result)]
    for a, b in zip(*grads, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode):
    z, codebook = torch.randn(20, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    expected = vqkernels.vector_quantize(z, codebook, statistics=True)
    with mode():
        result = vqkernels.vector_quantize(z, codebook, statistics=True)
        state = torch.randn(9, 6), torch.ones(9), torch.randn(9, 6)
        vqkernels.ema_update_(*state, result.counts, result.sums, decay=0.9, eps=1e-5)
    for a, b in zip(result, expected, strict=True):
        assert same_bits(a.detach(), b.detach())
        assert not a.requires_grad


def test_subclass_and_parameter_inputs():
    z, codebook = torch.nn.Parameter(torch.randn(20, 6)), torch.nn.Parameter(torch.randn(9, 6))
    vqkernels.vector_quantize(z, codebook, codebook_weight=1.0).loss.backward()
    assert z.grad is not None
    assert codebook.grad is not None
    fake = torch._subclasses.FakeTensorMode()
    with fake:
        result = vqkernels.vector_quantize(torch.empty(3, 20, 6).half(), torch.empty(3, 9, 6), statistics=True)
    assert result.quantized.shape == (3, 20, 6)
    assert result.quantized.dtype == torch.float16
    assert result.sums.shape == (3, 9, 6)
