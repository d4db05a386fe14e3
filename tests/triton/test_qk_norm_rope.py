"""Triton normalisation and rotation: values and gradients against float64, roundings against the plain expression."""

import re

import pytest
import torch
from budget import assert_within_budget
from vq_cases import same_bits

import vqkernels
from vqkernels.triton.qk_norm_rope import qk_norm_rope, qk_norm_rope_backward

NORMS = ("rms", "layer", "l2", None)
NAMES = ("q_weight", "k_weight", "q_bias", "k_bias")


def make_case(dtype, dim, rotated, norm, across, per_head, length=3):
    q, k = (torch.randn(2, length, heads, dim).to(dtype) for heads in (3, 2))
    parameters = {}
    for name, heads in zip(NAMES, (3, 2, 3, 2), strict=True):
        if norm is not None and (norm == "layer" or name.endswith("weight")):
            parameters[name] = torch.randn((heads, dim) if across or per_head else (dim,)).to(dtype)
    return q, k, parameters, vqkernels.rope_tables((length,), rotated) if rotated else (None, None)


def outcome(case, device, dtype=None, **options):
    """Values and gradients, on the CPU."""
    q, k, parameters, tables = case
    generator = torch.Generator().manual_seed(1)
    leaves = [t.to(device, dtype or t.dtype).clone().requires_grad_() for t in (q, k, *parameters.values())]
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype).to(device, dtype or t.dtype) for t in (q, k)]
    tables = [None if t is None else t.to(device) for t in tables]
    named = dict(zip(parameters, leaves[2:], strict=True))
    out = vqkernels.qk_norm_rope(*leaves[:2], *tables, **named, **options)
    return [t.detach().cpu() for t in (*out, *torch.autograd.grad(out, leaves, grads))]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(norm, layout, across, dtype, device):
    dim, rotated, per_head = {"interleaved": (12, 12, False), "half": (7, 4, True)}[layout]
    case = make_case(dtype, dim, rotated, norm, across, per_head)
    options = {"norm": norm, "across_heads": across, "layout": layout}
    actual = outcome(case, device, backend="triton", **options)
    expression = outcome(case, "cpu", backend="reference", numerics="eager", **options)
    truth = outcome(case, "cpu", torch.float64, backend="reference", **options)
    assert_within_budget(actual, expression, truth)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("across", [False, True])
def test_float64(norm, across, device):
    """The C++ kernels, checked by gradcheck, are the truth here."""
    case = make_case(torch.float64, 10, 8, norm, across, False)
    options = {"norm": norm, "across_heads": across}
    for a, e in zip(outcome(case, device, backend="triton", **options), outcome(case, "cpu", **options), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eager_roundings(norm, dtype, device):
    for layout, dim, rotated, across in (("interleaved", 12, 12, False), ("half", 9, 6, True)):
        case = make_case(dtype, dim, rotated, norm, across, False)
        options = {"norm": norm, "across_heads": across, "layout": layout, "numerics": "eager"}
        actual = outcome(case, device, backend="triton", **options)
        plain = outcome(case, device, backend="reference", **options)
        assert all(same_bits(a, e) for a, e in zip(actual, plain, strict=True))


def test_many_positions_and_views(device, monkeypatch):
    """More positions than programs, slices of a packed projection, and a transposed layout."""
    monkeypatch.setattr("vqkernels.triton.qk_norm_rope._PROGRAMS", 4)
    packed = torch.randn(1, 11, 3, 2, 4, device=device)
    q, _, grad = packed.unbind(2)
    weight = torch.randn(1, 4, device=device)
    args = weight, None, None, None, "rms", False, 1e-6, "half"
    dense = qk_norm_rope_backward(grad.contiguous(), q.contiguous(), *args)
    for view in (q, q.transpose(1, 2).contiguous().transpose(1, 2), q.transpose(2, 3).contiguous().transpose(2, 3)):
        grads = qk_norm_rope_backward(grad, view, *args)
        assert all(same_bits(a, b) for a, b in zip(grads, dense, strict=True))
        assert grads[0].stride() == torch.empty_like(view).stride()
    x, g = (t.double().cpu() for t in (q, grad))
    n = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(dense[1].cpu().double(), (g * n).sum((0, 1, 2))[None], rtol=1e-5, atol=1e-5)


def test_empty(device):
    x, weight = torch.zeros(2, 0, 3, 8, device=device), torch.ones(1, 8, device=device)
    args = weight, None, None, None
    assert qk_norm_rope(x, *args, None, "rms", False, 1e-6, "half").shape == x.shape
    grads = qk_norm_rope_backward(x, x, *args, "rms", False, 1e-6, "half")
    assert [g.shape for g in grads] == [x.shape, (1, 8), (0, 0)]
    assert torch.equal(grads[1].cpu(), torch.zeros(1, 8))


@pytest.mark.parametrize(
    "change",
    [
        {0: torch.zeros(2, 5, 3)},
        {1: torch.zeros(24)},
        {3: torch.zeros(1, 4, 12)},
        {3: None},
        {5: torch.ones(2, 5, 3, 1), 6: "layer"},
    ],
)
def test_direct_calls_are_checked(change):
    tables = [t[None] for t in vqkernels.rope_tables((5,), 24)]
    args = [torch.zeros(2, 5, 3, 24), torch.ones(1, 24), None, *tables, None, "rms", False, 1e-6, "half"]
    for place, value in change.items():
        args[place] = value
    with pytest.raises((ValueError, RuntimeError), match=r"expected"):
        qk_norm_rope(*args)


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "rotated"),
    [
        (90, torch.bfloat16, 128, 128),
        (90, torch.float32, 72, 64),
        (80, torch.float16, 40, 40),
        (80, torch.float64, 7, 0),
    ],
)
def test_compiles(capability, dtype, dim, rotated, compiled):
    programs = compiled(capability)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.zeros(2, 5, 6, dim, dtype=dtype)
    tables = [t[None].to(wide) for t in vqkernels.rope_tables((5,), rotated)] if rotated else [None, None]
    weight, factor = torch.ones(1, dim, dtype=wide), torch.ones(2, 5, 6, 1, dtype=wide)
    for norm, across, layout, bias in (
        ("rms", False, "interleaved", None),
        ("layer", True, "half", weight),
        ("l2", False, "half", None),
    ):
        qk_norm_rope(x, weight, bias, *tables, None, norm, across, 1e-6, layout)
        qk_norm_rope_backward(x, x, weight, bias, *tables, norm, across, 1e-6, layout)
    qk_norm_rope(x, weight, None, *tables, factor, "rms", False, 1e-6, "interleaved")
    qk_norm_rope(x, None, None, *tables, None, "none", False, 1e-6, "half")
    assert {key[0] for key in programs} == {"norm_rope_backward_kernel", "norm_rope_kernel"}
    for program in programs.values():
        instructions = set(re.findall(r"^\s*(?:@\S+\s+)?([a-z][\w.:]*)\s", program.ptx, re.MULTILINE))
        assert any(i.startswith("st.global") for i in instructions)
        # No atomics, nothing contracted, approximate or flushed to zero.
        assert not [i for i in instructions if re.search(r"^atom|^red\.|approx|ftz|div\.full|^fma\.rn\.f32", i)]
