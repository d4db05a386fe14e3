"""Triton's attention, forward and backward: against the plain expression in float64."""

import pytest
import torch
from budget import assert_rms_within_budget

import vqkernels
from vqkernels.triton.attention import attention, attention_backward


def plain(q, k, v, mask, causal, scale):
    """The whole matrix of weights, written with masked exponentials."""
    group = q.shape[1] // max(k.shape[1], 1)
    heads = torch.arange(q.shape[1]) // max(group, 1)
    scores = torch.einsum("bhld,bhsd->bhls", q, k[:, heads]).to(torch.promote_types(q.dtype, torch.float32)) * scale
    takes_part = torch.ones(scores.shape, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        takes_part = takes_part & mask
    elif mask is not None:
        scores = scores + mask
        takes_part = takes_part & (mask > -torch.inf)
    if causal:
        takes_part = takes_part.tril()
    top = scores.masked_fill(~takes_part, -1e30).amax(-1, keepdim=True).detach() if scores.shape[-1] else 0
    weights = torch.where(takes_part, (torch.where(takes_part, scores, top) - top).exp(), 0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.einsum("bhls,bhsd->bhld", weights.to(v.dtype), v[:, heads])


def make_mask(kind, heads, length, keys):
    if kind is None:
        return None
    mask = torch.rand(1, heads, length, keys) > 0.3
    mask[:, :, length // 2] = False  # a query without a key
    return mask if kind == "bool" else torch.randn(1, 1, length, keys).masked_fill(~mask, -torch.inf)


def with_gradients(q, k, v, grad, mask, causal, scale, dtype):
    leaves = [t.to(dtype).detach().requires_grad_() for t in (q, k, v)]
    out = plain(*leaves, mask if mask is None or mask.dtype == torch.bool else mask.to(dtype), causal, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def with_kernels(q, k, v, grad, mask, causal, scale, device):
    q, k, v, grad = (t.to(device) for t in (q, k, v, grad))
    mask = None if mask is None else mask.to(device)
    out, logsumexp = attention(q, k, v, mask, causal, scale)
    grads = attention_backward(grad, q, k, v, mask, out, logsumexp, causal, scale)
    return [t.cpu() for t in (out, *grads)]


def compare(problem, dtype, device):
    """Results of the kernels, of the expression in `dtype`, and the truth."""
    return with_kernels(*problem, device), *(with_gradients(*problem, d) for d in (dtype, torch.float64))


# batch, heads, key heads, L, S, D, Dv: up to three blocks of 32 rows on either side, and parts of 128 or 64 columns
SIZES = [(2, 4, 2, 33, 70, 8, 8), (1, 1, 1, 40, 35, 200, 136), (1, 2, 2, 1, 17, 16, 16), (1, 3, 1, 70, 20, 5, 9)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [None, "bool", "additive"])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, kind, causal, device):
    batch, heads, key_heads, length, keys, dim, v_dim = size

    def draw():
        q, k = torch.randn(batch, heads, length, dim), torch.randn(batch, key_heads, keys, dim)
        v, grad = torch.randn(batch, key_heads, keys, v_dim), torch.randn(batch, heads, length, v_dim)
        problem = (q, k, v, grad, make_mask(kind, heads, length, keys), causal and length > 1, dim**-0.5)
        compared = compare(problem, torch.float32, device)
        if kind is not None:
            assert not compared[0][0][:, :, length // 2].any()
            assert not compared[0][1][:, :, length // 2].any()
        return compared

    assert_rms_within_budget(draw() for _ in range(3))


def test_half_precision(device):
    """Weights are rounded to float16 before they meet v, gradients of scores before they meet q and k."""
    problems = [(*torch.randn(4, 1, 2, 70, 40).half(), None, False, 40**-0.5) for _ in range(3)]
    assert_rms_within_budget(compare(problem, torch.float16, device) for problem in problems)


def test_double_precision(device):
    q, k, v, grad = torch.randn(4, 1, 2, 20, 12, dtype=torch.float64)
    problem = (q, k, v, grad, make_mask("additive", 2, 20, 20), True, 0.3)
    for actual, exact in zip(with_kernels(*problem, device), with_gradients(*problem, torch.float64), strict=True):
        assert ((actual - exact).abs() <= 100 * 2.0**-53 * exact.abs().max()).all()


def test_one_head_of_512_columns(device):
    problems = [(*torch.randn(4, 1, 1, 20, 512), None, False, 512**-0.5) for _ in range(3)]
    assert_rms_within_budget(compare(problem, torch.float32, device) for problem in problems)


def test_views(device):
    """Of any strides, and with a mask that is broadcast: bitwise what contiguous copies give."""
    qkv = torch.randn(2, 20, 3, 2, 8)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    grad = torch.randn(2, 2, 8, 20).transpose(2, 3)
    mask = torch.randn(20)
    views = with_kernels(q, k, v, grad, mask, False, 0.3, device)
    whole = [t.contiguous() for t in (q, k, v, grad)]
    copies = with_kernels(*whole, mask.expand(2, 2, 20, 20).contiguous(), False, 0.3, device)
    assert all(torch.equal(a, b) for a, b in zip(views, copies, strict=True))


def test_large_scores_do_not_overflow(device):
    draws = []
    for _ in range(3):
        q, k, v, grad = torch.randn(4, 1, 1, 20, 8)
        compared = compare((100 * q, k, v, grad, None, False, 1.0), torch.float32, device)
        draws.append([values[:1] for values in compared])
    assert_rms_within_budget(draws)


def test_nan_stays_in_its_row(device):
    q, k, v, grad = torch.randn(4, 1, 1, 20, 8)
    q[0, 0, 3, 1] = torch.nan
    out = with_kernels(q, k, v, grad, None, False, 1.0, device)[0]
    assert out.isnan().any(-1).flatten().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("size", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)])
def test_empty(size, device):
    batch, heads, length, keys = size
    q, grad = torch.randn(2, batch, heads, length, 8)
    k, v = torch.randn(2, batch, heads, keys, 8)
    out, *grads = with_kernels(q, k, v, grad, None, False, 1.0, device)
    assert out.shape == q.shape
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert not any(t.any() for t in (out, *grads))


def test_public_function(device):
    q, k, v, grad = torch.randn(4, 2, 2, 20, 9, device=device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    outcomes = []
    for backend in ("triton", "reference"):
        out = vqkernels.attention(*leaves, causal=True, backend=backend)
        outcomes.append([out, *torch.autograd.grad(out, leaves, grad)])
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected)
    mask = torch.zeros(20, 20, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient of a mask"):
        vqkernels.attention(q, k, v, mask=mask, backend="triton")


@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "grad_out", "out", "logsumexp"])
def test_direct_calls_check_arguments(name, device):
    t = dict.fromkeys(("grad_out", "q", "k", "v"), torch.randn(1, 2, 5, 4, device=device))
    t |= {"mask": torch.ones(1, 2, 5, 5, dtype=torch.bool, device=device)}
    t |= dict(zip(("out", "logsumexp"), attention(t["q"], t["k"], t["v"], t["mask"], False, 1.0), strict=True))
    for wrong in (t[name][..., :3], t[name].unsqueeze(0), t[name].to(torch.int8)):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            attention_backward(*(t | {name: wrong}).values(), False, 1.0)


@pytest.mark.parametrize(
    ("capability", "dtype", "dim"),
    [
        (80, torch.float32, 512),
        (80, torch.bfloat16, 512),
        (80, torch.float16, 40),
        (90, torch.bfloat16, 512),
        (90, torch.float16, 128),
        (90, torch.float32, 72),
        (90, torch.float64, 512),
    ],
)
def test_compiles(capability, dtype, dim, compiled, tmp_path):
    """Shared memory of compute capability 8.6 suffices everywhere, and registers but for a few."""
    programs = compiled(capability)
    q = torch.zeros(1, 2, 64, dim, dtype=dtype)
    out, logsumexp = attention(q, q, q, None, False, 1.0)
    attention_backward(q, q, q, q, None, out, logsumexp, False, 1.0)
    assert {key[0] for key in programs} == {
        "attention_kernel",
        "inner_kernel",
        "backward_q_kernel",
        "backward_kv_kernel",
    }
    for program in programs.values():
        assert program.shared <= 99 * 1024
        assert program.registers_and_stack(tmp_path)[1] <= 256
        assert "atom." not in program.ptx
        assert "tf32" not in program.ptx
    if dtype in (torch.bfloat16, torch.float16):
        assert sum("mma" in program.ptx for program in programs.values()) == 3


def test_masks_compile(compiled):
    programs = compiled(90)
    q = torch.zeros(1, 2, 64, 64, dtype=torch.bfloat16)
    for mask in (torch.ones(64, dtype=torch.bool), torch.zeros(64, 64)):
        out, logsumexp = attention(q, q, q, mask, True, 1.0)
        attention_backward(q, q, q, q, mask, out, logsumexp, True, 1.0)
    assert len(programs) == 7
