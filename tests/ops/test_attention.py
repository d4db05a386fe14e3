"""Attention against the plain expression in float64; where torch's kernels serve, and where ours; memory."""

import os
import subprocess
import sys

import pytest
import torch
from budget import assert_rms_within_budget

import vqkernels
from vqkernels.ops.attention import why_not_sdpa

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLASH = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value


def plain(q, k, v, mask=None, causal=False, scale=None):
    """The whole matrix of weights, written with masked exponentials."""
    heads = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
    scores = torch.einsum("bhld,bhsd->bhls", q, k[:, heads]).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    takes_part = torch.ones(scores.shape, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        takes_part = takes_part & mask
    elif mask is not None:
        scores = scores + mask
        takes_part = takes_part & (mask > -torch.inf)
    if causal:
        takes_part = takes_part.tril()
    top = scores.masked_fill(~takes_part, -1e30).amax(-1, keepdim=True).detach()
    weights = torch.where(takes_part, (torch.where(takes_part, scores, top) - top).exp(), 0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.einsum("bhls,bhsd->bhld", weights.to(v.dtype), v[:, heads])


def with_gradients(function, tensors, grad, dtype, **options):
    leaves = [t.to(dtype).detach().requires_grad_() for t in tensors]
    mask = options.pop("mask", None)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype).detach().requires_grad_()
        leaves.append(mask)
    out = function(*leaves[:3], mask=mask, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def make_mask(kind, shape):
    if kind is None:
        return None
    mask = torch.rand(shape) > 0.3
    mask[..., shape[-2] // 2, :] = False  # a query without a key, where the mask has rows
    return mask if kind == "bool" else torch.randn(shape).masked_fill(~mask, -torch.inf)


def problem(batch, heads, key_heads, length, keys, dim, v_dim, dtype=torch.float32):
    q, k = torch.randn(batch, heads, length, dim), torch.randn(batch, key_heads, keys, dim)
    v, grad = torch.randn(batch, key_heads, keys, v_dim), torch.randn(batch, heads, length, v_dim)
    return [t.to(dtype) for t in (q, k, v, grad)]


SIZES = [
    ((2, 4, 2, 70, 255, 72, 72), (2, 4, 70, 255)),
    ((2, 3, 1, 20, 33, 40, 24), (20, 33)),
    ((1, 1, 1, 255, 50, 160, 160), (1, 1, 255, 50)),
]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", [None, "bool", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype, kind, backend):
    """Gradients of an additive mask too, which has the shape of all scores, or is shared by heads and batch."""

    def draw(size, shape, causal):
        *tensors, grad = problem(*size, dtype)
        mask = make_mask(kind, shape)
        options = {"mask": mask if mask is None or kind == "bool" else mask.to(dtype), "causal": causal}
        actual = with_gradients(vqkernels.attention, tensors, grad, dtype, **options, backend=backend)
        return actual, *(with_gradients(plain, tensors, grad, d, **options) for d in (dtype, torch.float64))

    for size, shape in SIZES:
        for causal in (False, True):
            assert_rms_within_budget(draw(size, shape, causal) for _ in range(3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_default_is_torch_or_ours(dtype):
    """To the bit, gradients included, of the one or the other."""
    for size, shape in SIZES:
        *tensors, grad = problem(*size, dtype)
        for mask, causal in ((None, False), (None, True), (make_mask("bool", shape), False)):
            options = {"mask": mask, "causal": causal}
            actual = with_gradients(vqkernels.attention, tensors, grad, dtype, **options)
            if size[-1] != size[-2]:
                expected = with_gradients(vqkernels.attention, tensors, grad, dtype, **options, backend="native")
            else:
                options = {"attn_mask": mask, "is_causal": causal, "enable_gqa": size[1] != size[2]}
                leaves = [t.clone().requires_grad_() for t in tensors]
                out = torch.nn.functional.scaled_dot_product_attention(*leaves, **options)
                expected = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", [None, "native", "reference"])
def test_gradcheck(backend):
    q, k, v, _ = (t.requires_grad_() for t in problem(1, 2, 1, 5, 6, 3, 4, torch.float64))
    mask = torch.randn(2, 5, 1, dtype=torch.float64) + torch.randn(1, 1, 6, dtype=torch.float64)
    mask[0, 2] = -torch.inf
    for causal in (False, True):
        for bias in (None, torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True), mask):
            assert torch.autograd.gradcheck(
                lambda q, k, v, *bias, causal=causal: vqkernels.attention(
                    q, k, v, mask=bias[0] if bias else None, causal=causal, scale=0.7, backend=backend
                ),
                (q, k, v) if bias is None else (q, k, v, bias),
            )


@pytest.mark.parametrize("backend", [None, "native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_without_keys(dtype, backend):
    """Zeros, with zero gradients: as torch's own function has it."""
    *tensors, grad = problem(1, 2, 2, 8, 9, 16, 16, dtype)
    mask = torch.ones(1, 1, 8, 9, dtype=torch.bool)
    mask[:, :, 3] = False
    out, grad_q, *_ = with_gradients(vqkernels.attention, tensors, grad, dtype, mask=mask, backend=backend)
    assert not out[:, :, 3].any()
    assert not grad_q[:, :, 3].any()
    assert not out.isnan().any()
    for size in ((1, 2, 2, 8, 0, 16, 16), (1, 2, 2, 0, 9, 16, 16), (0, 2, 2, 8, 9, 16, 16)):
        *tensors, grad = problem(*size, dtype)
        out, *grads = with_gradients(vqkernels.attention, tensors, grad, dtype, backend=backend)
        assert out.shape == grad.shape
        assert [g.shape for g in grads] == [t.shape for t in tensors]
        assert not any(t.any() for t in (out, *grads))


def test_parts_agree_with_the_whole(monkeypatch):
    """However small the parts: rows, single heads, several batch elements."""
    *tensors, grad = problem(3, 4, 2, 40, 50, 8, 6, torch.float64)
    mask = make_mask("additive", (3, 1, 40, 50)).double()
    truth = with_gradients(plain, tensors, grad, torch.float64, mask=mask, causal=True)
    for scores in (1, 4_000, 20_000, 1_000_000):
        monkeypatch.setattr("vqkernels.ops._chunked_attention._SCORES", scores)
        actual = with_gradients(vqkernels.attention, tensors, grad, torch.float64, mask=mask, causal=True)
        for a, b in zip(actual, truth, strict=True):
            assert ((a - b).abs() <= 500 * 2.0**-53 * b.abs().max()).all()


def test_repeats_to_the_bit():
    for v_dim in (64, 32):
        *tensors, grad = problem(2, 4, 4, 300, 257, 64, v_dim)
        runs = [with_gradients(vqkernels.attention, tensors, grad, torch.float32) for _ in range(3)]
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_views():
    qkv = torch.randn(2, 50, 3, 4, 16)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    strided = torch.randn(2, 4, 16, 50).transpose(2, 3)
    for backend in (None, "native"):
        for tensors in ((q, k, v), (strided, strided, strided), (q[:1].expand(2, -1, -1, -1), k, v)):
            out = vqkernels.attention(*tensors, backend=backend)
            torch.testing.assert_close(out, vqkernels.attention(*(t.contiguous() for t in tensors), backend=backend))


def choices():
    for dtype in DTYPES:
        for dim in (1, 7, 40, 64, 512, 1024):
            q = torch.randn(1, 2, 9, dim).to(dtype)
            yield (q, q, q), {}
    q = torch.randn(2, 4, 9, 16)
    for shape in ((9, 9), (1, 9), (2, 1, 1, 9), (2, 4, 9, 9), (1, 4, 9, 1)):
        for mask in (torch.ones(shape, dtype=torch.bool), torch.ones(shape), torch.ones(shape, requires_grad=True)):
            yield (q, q, q), {"mask": mask.reshape((1,) * (4 - mask.ndim) + mask.shape)}
    yield (q, q, q), {"causal": True}
    yield (q[:, :, :4], q, q), {"causal": True}
    yield (q, q[:, :2], q[:, :2]), {}
    yield (q, q, q[..., :8]), {}
    yield (q.clone().requires_grad_(), q, q), {}
    yield (q[:, :, :0], q, q), {}
    yield (q, q[:, :, :0], q[:, :, :0]), {}


def test_torch_serves_where_it_keeps_memory():
    """Its own choice among kernels, for every input that the predicate lets pass, and for none that it does not."""
    passed = []
    for (q, k, v), options in choices():
        mask, causal = options.get("mask"), options.get("causal", False)
        chosen = torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, enable_gqa=k.shape[1] != q.shape[1])
        passed.append(why_not_sdpa(q, k, v, **options) is None)
        assert passed[-1] == (chosen == FLASH), (q.shape, k.shape, v.shape, options)
    assert 0 < sum(passed) < len(passed)
    q = torch.randn(1, 1, 4, 8)
    assert (
        why_not_sdpa(q, q, q, mask=torch.ones(1, 1, 4, 4), causal=True) == "torch takes a mask or causal=True, not both"
    )


@pytest.mark.parametrize(
    ("dtype", "dim", "options", "reason"),
    [
        (torch.bfloat16, 64, {}, None),
        (torch.float16, 256, {}, None),
        (torch.bfloat16, 512, {}, "at most 256 columns, not 512"),
        (torch.float64, 64, {}, "float64"),
        (torch.float32, 64, {}, None),
        (torch.float32, 65, {}, "multiple of 4 columns, not 65"),
        (torch.bfloat16, 68, {"mask": torch.bool}, "multiple of 8 columns, not 68"),
        (torch.bfloat16, 64, {"mask": torch.bool}, None),
        (torch.bfloat16, 64, {"mask": torch.float32}, "a mask of bool or bfloat16"),
        (torch.bfloat16, 64, {"gradient": True}, "repeat only under"),
        (torch.bfloat16, 68, {"causal": True}, None),
        (torch.bfloat16, 68, {"causal": True, "keys": 17}, "causal bfloat16 of L != S needs heads of a multiple of 8"),
        (torch.bfloat16, 64, {"causal": True, "keys": 17}, None),
        (torch.bfloat16, 64, {"causal": True, "keys": 17, "key_heads": 1}, "as many key heads as query heads"),
        (torch.bfloat16, 64, {"key_heads": 1}, None),
    ],
)
def test_reasons_on_cuda(dtype, dim, options, reason):
    """Decided from shapes and dtypes alone, so that fake tensors show it without a GPU."""
    torch.use_deterministic_algorithms(False)
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(1, 2, 16, dim, dtype=dtype, device="cuda", requires_grad=options.get("gradient", False))
        k = torch.empty(1, options.get("key_heads", 2), options.get("keys", 16), dim, dtype=dtype, device="cuda")
        mask = torch.empty(1, 1, 16, 16, dtype=options["mask"], device="cuda") if "mask" in options else None
        told = why_not_sdpa(q, k, k, mask=mask, causal=options.get("causal", False))
        assert told is None if reason is None else reason in told
        if options.get("gradient"):
            torch.use_deterministic_algorithms(True)
            assert why_not_sdpa(q, q, q) is None


def test_autocast():
    *tensors, _ = problem(1, 2, 2, 9, 9, 16, 16)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            for backend in (None, "native", "reference"):
                assert vqkernels.attention(*tensors, backend=backend).dtype == dtype
            # What the cast leaves is computed in float32 all the same.
            inside = vqkernels.attention(*tensors, backend="native")
        assert torch.equal(inside, vqkernels.attention(*(t.to(dtype) for t in tensors), backend="native"))


def test_opcheck():
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    for dtype in DTYPES:
        q, k, v, grad = problem(2, 4, 2, 5, 6, 8, 3, dtype)
        for mask in (None, torch.ones(1, 1, 5, 6, dtype=torch.bool)):
            ops = torch.ops.vqkernels
            torch.library.opcheck(ops.attention.default, (q, k, v, mask, True, 0.5), test_utils=utilities)
            out, logsumexp = ops.attention(q, k, v, mask, True, 0.5)
            saved = (grad, q, k, v, mask, out, logsumexp, True, 0.5)
            torch.library.opcheck(ops.attention_backward.default, saved, test_utils=utilities)


@pytest.mark.slow
@pytest.mark.parametrize("v_dim", [16, 8])
def test_compile(v_dim):
    """Through torch's function, and through ours."""
    *tensors, grad = problem(1, 2, 2, 9, 9, 16, v_dim)
    compiled = torch.compile(vqkernels.attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        with_gradients(compiled, tensors, grad, torch.float32),
        with_gradients(vqkernels.attention, tensors, grad, torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


PEAK = """
import sys, torch, vqkernels
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
def call(rows, backend):
    mask = None if sys.argv[1] == "sdpa" else torch.randn(1, rows, requires_grad=True)
    tensors = [torch.randn(1, 1, rows, 128, dtype=torch.float64).requires_grad_() for _ in range(3)]
    vqkernels.attention(*tensors, mask=mask, backend=backend).sum().backward()
backend = {"sdpa": None, "mask": None, "native": "native", "reference": "reference"}[sys.argv[1]]
call(16, backend)  # what a first call loads
open("/proc/self/clear_refs", "w").write("5")
before = peak()
call(4096, backend)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", ["sdpa", "mask", "native", "reference"])
def test_peak_memory(call):
    """In float64, at L = S = 4096 and one head of 128: forward, backward, and all tensors of the call.

    glibc raises the size from which on memory goes back at once by what was freed, unless that size is set; what lay in
    its heap would count as in use, more or less of it from run to run.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK, call]
    extra = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    scores, rows = 4096 * 4096 * 8, 4096 * 128 * 8
    if call == "reference":
        assert extra > 3 * scores  # the measurement sees what it should
    else:
        # Three inputs, their gradients, result, its gradient, a copy; and parts of 2^20 scores, five at a time.
        assert extra < 9 * rows + 5 * 2**20 * 8
        assert extra < 0.6 * scores


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, ValueError, r"^q: expected shape \[B, H, L, D\] .* got \[2, 3, 4\]"),
        ({"k": torch.zeros(1, 2, 5, 7)}, ValueError, r"^k: expected shape \[1, Hk, S, 8\]"),
        ({"k": torch.zeros(1, 3, 5, 8)}, ValueError, r"^k: .* Hk a divisor of 2"),
        ({"v": torch.zeros(1, 2, 4, 8)}, ValueError, r"^v: expected shape \[1, 2, 5, Dv\]"),
        ({"k": torch.zeros(1, 2, 5, 8, dtype=torch.float64)}, ValueError, r"^k: expected float32 .* got float64"),
        ({"v": torch.zeros(1, 2, 5, 8, dtype=torch.int64)}, TypeError, r"^v: expected a tensor of float32"),
        ({"q": None}, TypeError, r"^q: expected a tensor"),
        ({"mask": torch.zeros(4, 6)}, ValueError, r"^mask: expected a shape that broadcasts to \[1, 2, 4, 5\]"),
        ({"mask": torch.zeros(1, 1, 1, 4, 5)}, ValueError, r"^mask: expected a shape"),
        ({"mask": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, r"^mask: expected a tensor of bool"),
        ({"scale": "one"}, TypeError, r"^scale: expected a number"),
        ({"backend": "cuda"}, ValueError, r"^backend: expected"),
    ],
)
def test_bad_input(change, error, message):
    good = {"q": torch.zeros(1, 2, 4, 8), "k": torch.zeros(1, 2, 5, 8), "v": torch.zeros(1, 2, 5, 8)} | change
    with pytest.raises(error, match=message):
        vqkernels.attention(good.pop("q"), good.pop("k"), good.pop("v"), **good)
