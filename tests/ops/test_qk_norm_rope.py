"""Normalised and rotated queries and keys: against float64, diffusers and torch bit for bit, invariances, views."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from vq_cases import DTYPES, LEVELS, cpu_level, same_bits

import vqkernels

NORMS = ("rms", "layer", "l2", None)
LAYOUTS = ("interleaved", "half")
HALVES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("q_weight", "k_weight", "q_bias", "k_bias")


def make_case(dtype, dim, rotated, norm, across=False, batch=2, length=5, heads=3, key_heads=2, shape="dim"):
    """q, k, their parameters by name, and tables."""
    q, k = (torch.randn(batch, length, h, dim).to(dtype) for h in (heads, key_heads))
    parameters = {}
    for name, h in zip(NAMES, (heads, key_heads) * 2, strict=True):
        if norm is None or (name.endswith("bias") and norm != "layer"):
            continue
        sizes = {"dim": (dim,), "flat": (h * dim,), "heads": (h, dim), "scale": (h, 1), "scalar": ()}
        parameters[name] = torch.randn(sizes["flat" if across else shape]).to(dtype)
    tables = vqkernels.rope_tables((length,), rotated) if rotated else (None, None)
    return q, k, parameters, tables


def truth(x, weight, bias, cos, sin, norm, across, layout, eps=1e-6):
    """In float64: the norm by its definition, the rotation as a product of complex numbers."""
    x = x.double()
    axes = (-2, -1) if across else (-1,)
    if norm == "layer":
        x = x - x.mean(axes, keepdim=True)
    if norm == "l2":
        x = x / x.square().sum(axes, keepdim=True).sqrt().clamp(min=eps)
    elif norm is not None:
        x = x / (x.square().mean(axes, keepdim=True) + eps).sqrt()
    for parameter, combine in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            flat = parameter.ndim == 1 and parameter.numel() == x.shape[2:].numel()
            x = combine(x, parameter.double().reshape(x.shape[2:]) if flat else parameter.double())
    if cos is None:
        return x
    pairs = cos.shape[-1]
    part, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if layout == "interleaved":
        z = torch.complex(part[..., ::2], part[..., 1::2])
    else:
        z = torch.complex(part[..., :pairs], part[..., pairs:])
    z = z * torch.complex(cos.double(), sin.double()).unsqueeze(-2)
    parts = torch.stack([z.real, z.imag], -1 if layout == "interleaved" else -2)
    return torch.cat([parts.flatten(-2), rest], -1)


def with_gradients(function, q, k, parameters, grads, dtype=None):
    """Values of function(q, k, parameters) and the gradients of all of these."""
    leaves = [(t if dtype is None else t.to(dtype)).detach().clone().requires_grad_() for t in (q, k)]
    named = {n: (t if dtype is None else t.to(dtype)).detach().clone().requires_grad_() for n, t in parameters.items()}
    out = function(*leaves, named)
    out_grads = [g.to(o.dtype) for g, o in zip(grads, out, strict=True)]
    return [o.detach() for o in out], list(torch.autograd.grad(out, [*leaves, *named.values()], out_grads))


def check_case(q, k, parameters, tables, norm, across, layout, **options):
    grads = [torch.randn(t.shape).to(t.dtype) for t in (q, k)]
    common = {"norm": norm, "across_heads": across, "layout": layout, **options}
    eps = options.get("eps", 1e-6)

    def fused(q, k, named):
        return vqkernels.qk_norm_rope(q, k, *tables, **named, **common)

    def plain(q, k, named):
        return vqkernels.qk_norm_rope(q, k, *tables, **named, **common, numerics="eager", backend="reference")

    def exact(q, k, named):
        return [
            truth(x, named.get(f"{n}_weight"), named.get(f"{n}_bias"), *tables, norm, across, layout, eps)
            for n, x in (("q", q), ("k", k))
        ]

    actual, expression = (with_gradients(f, q, k, parameters, grads) for f in (fused, plain))
    true = with_gradients(exact, q, k, parameters, grads, torch.float64)
    assert_within_budget(actual[0], expression[0], true[0])
    assert_within_budget(actual[1], expression[1], true[1])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_values_and_gradients(norm, layout, across, dtype):
    for dim, rotated in ((72, 72), (40, 24), (64, 64), (80, 0), (128, 128), (160, 32), (512, 512), (7, 4), (9, 0)):
        case = make_case(dtype, dim, rotated, norm, across, length=33)
        check_case(*case, norm, across, layout)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("dim", "rotated"), [(1, 0), (2, 2), (3, 2)])
def test_tiny_heads(norm, dim, rotated):
    check_case(*make_case(torch.float32, dim, rotated, norm, length=301), norm, False, "half", eps=1e-2)


@pytest.mark.parametrize("length", [1, 255, 4097])
def test_lengths(length):
    check_case(*make_case(torch.float32, 40, 40, "rms", length=length, batch=1), "rms", False, "interleaved")


@pytest.mark.parametrize("norm", ["rms", "layer", "l2"])
@pytest.mark.parametrize("shape", ["dim", "heads", "scale", "scalar"])
@pytest.mark.parametrize("across", [False, True])
def test_shapes_of_parameters(norm, shape, across):
    q, k, parameters, tables = make_case(torch.bfloat16, 24, 24, norm, shape=shape)
    check_case(q, k, parameters, tables, norm, across, "interleaved")


def test_parameters_of_other_types():
    """Computed in float32, in which a weight of float32 is exact whatever the input."""
    q, k, parameters, tables = make_case(torch.bfloat16, 24, 24, "layer")
    wide = {n: t.float() + 2.0**-12 for n, t in parameters.items()}
    actual, _ = vqkernels.qk_norm_rope(q, k, *tables, norm="layer", **wide)
    assert actual.dtype == torch.bfloat16
    expected = truth(q, wide["q_weight"], wide["q_bias"], *tables, "layer", False, "interleaved")
    assert (actual.double() - expected).abs().max() <= (2.0**-8 + 2.0**-20) * expected.abs().max()


def test_tables_of_a_batch():
    q, k, parameters, _ = make_case(torch.float32, 16, 0, "rms", batch=3)
    angles = torch.rand(3, 5, 8, dtype=torch.float64) * 100
    cos, sin = angles.cos().float(), angles.sin().float()
    check_case(q, k, parameters, (cos, sin), "rms", False, "half")
    whole = vqkernels.qk_norm_rope(q, k, cos, sin, **parameters)
    for b in range(3):
        for actual, expected in zip(
            vqkernels.qk_norm_rope(q[b : b + 1], k[b : b + 1], cos[b], sin[b], **parameters), whole, strict=True
        ):
            assert torch.equal(actual[0], expected[b])


def test_layer_norm_far_from_zero():
    q, k, parameters, tables = make_case(torch.float32, 72, 72, "layer", length=64)
    check_case(q + 1e4, k - 1e4, parameters, tables, "layer", False, "interleaved")


def test_long_rows():
    """Sums over 5120 numbers of a position, and over positions for the weight."""
    case = make_case(torch.float32, 128, 128, "rms", True, length=33, heads=40, key_heads=40, batch=1)
    check_case(*case, "rms", True, "interleaved")


@pytest.mark.parametrize("norm", ["rms", "layer", "l2"])
@pytest.mark.parametrize("dtype", HALVES)
def test_extremes(norm, dtype):
    """Infinite, not a number, overflowing or zero where the expression is, and nowhere else."""
    q, k, parameters, tables = make_case(dtype, 24, 24, norm, length=8)
    largest = torch.finfo(dtype).max
    q[0, 0], q[0, 1, 0, 3], q[0, 2, 1, 5], q[0, 3, 2] = 0, torch.nan, torch.inf, largest
    k[1] = 1e-4 * k[1]
    parameters["k_weight"] = parameters["k_weight"] * (largest / 4)
    common = {"norm": norm, **parameters}
    actual = vqkernels.qk_norm_rope(q, k, *tables, **common)
    plain = vqkernels.qk_norm_rope(q, k, *tables, **common, numerics="fp32", backend="reference")
    for a, e in zip(actual, plain, strict=True):
        assert torch.equal(a.isnan(), e.isnan())
        assert torch.equal(a[e.isinf()], e[e.isinf()])
        assert a[e.isfinite()].isfinite().all()
    if dtype == torch.float16 and norm != "l2":
        assert plain[1].isinf().any()


def attention_norms(dim, norm, dtype):
    """The norms of diffusers' attention; with a LayerNorm or without parameters."""
    attention = Attention(3 * dim, heads=3, kv_heads=3, dim_head=dim, qk_norm=norm, eps=1e-6).to(dtype)
    for p in attention.parameters():
        torch.nn.init.normal_(p)
    return attention.norm_q, attention.norm_k


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "norm", "across"),
    [
        ("rms_norm", "rms", False),
        ("layer_norm", "layer", False),
        ("rms_norm_across_heads", "rms", True),
        ("layer_norm_across_heads", "layer", True),
        ("l2", "l2", False),
        (None, None, False),
    ],
)
def test_eager_equals_diffusers(name, norm, across, layout, dtype):
    for dim in (24, 72, 128):
        norms = attention_norms(dim, name, dtype) if name else (torch.nn.Identity(),) * 2
        q, k, _, (cos, sin) = make_case(dtype, dim, dim, None, key_heads=3, length=19)
        repeated = [
            t.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat([t, t], -1) for t in (cos, sin)
        ]
        grads = torch.randn_like(q), torch.randn_like(k)

        def original(q, k, named, norms=norms, repeated=repeated):
            q, k = ((n(x.flatten(2)).view_as(x) if across else n(x)) for n, x in zip(norms, (q, k), strict=True))
            side = -1 if layout == "interleaved" else -2
            return [apply_rotary_emb(x, repeated, sequence_dim=1, use_real_unbind_dim=side) for x in (q, k)]

        parameters = {
            f"{n}_{kind}": p
            for n, module in zip("qk", norms, strict=True)
            for kind in ("weight", "bias")
            if (p := getattr(module, kind, None)) is not None
        }

        def expected_gradients(q, k, named, norms=norms):
            for n, module in zip("qk", norms, strict=True):
                for kind in ("weight", "bias"):
                    if f"{n}_{kind}" in named:
                        del module._parameters[kind]
                        module._parameters[kind] = named[f"{n}_{kind}"]
            return original(q, k, named)

        def fused(q, k, named, cos=cos, sin=sin):
            return vqkernels.qk_norm_rope(
                q, k, cos, sin, norm=norm, across_heads=across, layout=layout, numerics="eager", **named
            )

        actual = with_gradients(fused, q, k, parameters, grads)
        expected = with_gradients(expected_gradients, q, k, parameters, grads)
        for a, e in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
            assert same_bits(a, e)


@pytest.mark.parametrize("across", [False, True])
def test_eager_equals_torch_rms_norm_in_float32(across):
    q, k, parameters, tables = make_case(torch.float32, 72, 72, "rms", across)
    grads = torch.randn_like(q), torch.randn_like(k)

    def original(q, k, named):
        axes = 2 if across else 3
        normed = [
            F.rms_norm(x.flatten(axes), w.shape, w, 1e-6).view_as(x)
            for x, w in zip((q, k), named.values(), strict=True)
        ]
        return vqkernels.qk_norm_rope(*normed, *tables, norm=None, numerics="eager")

    def fused(q, k, named):
        return vqkernels.qk_norm_rope(q, k, *tables, across_heads=across, numerics="eager", **named)

    actual, expected = (with_gradients(f, q, k, parameters, grads) for f in (fused, original))
    for a, e in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert same_bits(a, e)


@pytest.mark.parametrize("dtype", HALVES)
def test_eager_equals_normalize_with_a_learned_scale(dtype):
    """As VAR and MUSE write it."""
    q, k, parameters, _ = make_case(dtype, 64, 0, "l2", shape="scale")
    grads = torch.randn_like(q), torch.randn_like(k)

    def original(q, k, named):
        return [F.normalize(x, dim=-1).mul(w) for x, w in zip((q, k), named.values(), strict=True)]

    def fused(q, k, named):
        return vqkernels.qk_norm_rope(q, k, norm="l2", eps=1e-12, numerics="eager", **named)

    actual, expected = (with_gradients(f, q, k, parameters, grads) for f in (fused, original))
    for a, e in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert same_bits(a, e)


def test_eager_with_a_weight_of_float32():
    """The expression of diffusers' RMSNorm, whose result then is float32."""
    q, k, _, _ = make_case(torch.bfloat16, 24, 0, None)
    norm = RMSNorm(24, 1e-6)
    torch.nn.init.normal_(norm.weight)
    actual = vqkernels.qk_norm_rope(q, k, q_weight=norm.weight, k_weight=norm.weight, numerics="eager")
    for a, e in zip(actual, (norm(q), norm(k)), strict=True):
        assert same_bits(a, e)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_gradcheck(norm, across, layout, numerics):
    q, k, parameters, tables = make_case(torch.float64, 6, 4, norm, across, length=2)

    def call(q, k, *values):
        named = dict(zip(parameters, values, strict=True))
        return vqkernels.qk_norm_rope(
            q, k, *tables, norm=norm, across_heads=across, layout=layout, numerics=numerics, **named
        )

    inputs = [t.requires_grad_() for t in (q, k, *parameters.values())]
    assert torch.autograd.gradcheck(call, inputs)


def test_gradient_below_the_eps_of_l2():
    q = torch.full((1, 1, 1, 4), 1e-9, dtype=torch.float64, requires_grad=True)
    out, _ = vqkernels.qk_norm_rope(q, None, norm="l2", eps=1e-3)
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(grad, torch.full_like(grad, 1.0 / 1e-3))


def outcome(case, norm, across, layout, numerics="fp32"):
    q, k, parameters, tables = case
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (q, k)]

    def call(q, k, named):
        return vqkernels.qk_norm_rope(
            q, k, *tables, norm=norm, across_heads=across, layout=layout, numerics=numerics, **named
        )

    return list(itertools.chain(*with_gradients(call, q, k, parameters, grads)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_threads_and_runs_agree(norm, layout, dtype):
    for across, (dim, rotated), length in (
        (False, (72, 72), 70),
        (True, (40, 24), 41),
        (False, (7, 6), 9),
        (False, (18, 0), 3),
    ):
        case = make_case(dtype, dim, rotated, norm, across, length=length)
        for numerics in ("fp32", "eager"):
            results = []
            for level, threads in ((LEVELS[0], 1), (LEVELS[0], 3), *((level, 2) for level in LEVELS), (LEVELS[-1], 1)):
                torch.set_num_threads(threads if numerics == "fp32" else 1)
                with cpu_level(level):
                    results.append(outcome(case, norm, across, layout, numerics))
            for other in results[1:]:
                assert all(same_bits(a, b) for a, b in zip(other, results[0], strict=True))


def test_packed_views_are_not_copied(monkeypatch):
    """Slices of one projection of q, k and v, and what a transposed layout gives: equal, and in its order."""
    packed = torch.randn(2, 33, 3, 4, 24)
    q, k, _ = packed.unbind(2)
    tables = vqkernels.rope_tables((33,), 24)
    weight = torch.randn(24)
    want = vqkernels.qk_norm_rope(q.contiguous(), k.contiguous(), *tables, q_weight=weight, k_weight=weight)
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)]
    for views in ((q, k), transposed):
        leaves = [v.detach().requires_grad_() for v in views]
        actual = vqkernels.qk_norm_rope(*leaves, *tables, q_weight=weight, k_weight=weight)
        for a, e, view in zip(actual, want, views, strict=True):
            assert same_bits(a.detach(), e)
            assert a.stride() == torch.empty_like(view).stride()
        grads = torch.autograd.grad(actual, leaves, [torch.ones_like(a) for a in actual])
        leaves = [v.contiguous().detach().requires_grad_() for v in views]
        again = vqkernels.qk_norm_rope(*leaves, *tables, q_weight=weight, k_weight=weight)
        for g, e in zip(grads, torch.autograd.grad(again, leaves, [torch.ones_like(a) for a in again]), strict=True):
            assert same_bits(g, e)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        vqkernels.qk_norm_rope(packed.requires_grad_().unbind(2)[0], None, *tables, q_weight=weight)
    inputs = {t.untyped_storage().data_ptr() for t in (packed, weight, *tables)}
    assert saved
    assert {t.untyped_storage().data_ptr() for t in saved} <= inputs


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t[:1].expand(2, -1, -1, -1),
        lambda t: torch.cat([t, t], -1)[..., ::2],
        lambda t: torch.cat([t, t], 1)[:, 1:6],
        lambda t: torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t),
    ],
    ids=["columns", "expanded", "strided", "offset", "unaligned"],
)
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_views(view, numerics):
    q, k, parameters, tables = make_case(torch.float32, 24, 16, "rms")
    q, k = view(q), view(k)
    tables = [torch.cat([t, t], -1)[:, ::2] for t in tables]
    case = q, k, parameters, tables
    dense = q.contiguous(), k.contiguous(), parameters, [t.contiguous() for t in tables]
    for a, e in zip(outcome(case, "rms", False, "half"), outcome(dense, "rms", False, "half"), strict=True):
        assert same_bits(a, e)
    common = {"norm": "rms", "numerics": numerics, **parameters}
    for a, x in zip(vqkernels.qk_norm_rope(q, k, *tables, **common), (q, k), strict=True):
        assert a.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0)])
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_empty(batch, length, numerics):
    case = make_case(torch.float32, 24, 24, "layer", batch=batch, length=length)
    q, k, *_ = case
    results = outcome(case, "layer", False, "interleaved", numerics)
    assert [r.shape for r in results[:4]] == [q.shape, k.shape] * 2
    assert all(torch.equal(r, torch.zeros(24)) for r in results[4:])


def test_queries_alone_and_keys_of_another_length():
    q, k, parameters, _ = make_case(torch.float32, 24, 0, "rms")
    both = vqkernels.qk_norm_rope(q, k, **parameters)
    alone, none = vqkernels.qk_norm_rope(q, None, q_weight=parameters["q_weight"])
    assert none is None
    assert torch.equal(alone, both[0])
    longer = torch.cat([k, k], 1)
    _, keys = vqkernels.qk_norm_rope(q, longer, **parameters)
    assert torch.equal(keys, torch.cat([both[1]] * 2, 1))
    unchanged, _ = vqkernels.qk_norm_rope(q, k, norm=None)
    assert torch.equal(unchanged, q)


def test_gradients_that_are_not_asked_for():
    q, k, parameters, tables = make_case(torch.float32, 24, 24, "rms")
    for numerics in ("fp32", "eager"):
        frozen = vqkernels.qk_norm_rope(q.requires_grad_(), k, *tables, **parameters, numerics=numerics)
        assert frozen[0].requires_grad
        assert not frozen[1].requires_grad
        weight = parameters["k_weight"].clone().requires_grad_()
        out = vqkernels.qk_norm_rope(q, k, *tables, **(parameters | {"k_weight": weight}), numerics=numerics)[1]
        (grad,) = torch.autograd.grad(out.sum(), weight)
        assert grad.shape == weight.shape
    with torch.no_grad():
        assert not vqkernels.qk_norm_rope(q, k, *tables, **parameters)[0].requires_grad


def test_no_second_derivative_rather_than_a_wrong_one():
    q = torch.randn(1, 2, 1, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(vqkernels.qk_norm_rope(q, None)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.square().sum().backward()


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_autocast_changes_nothing(numerics):
    case = make_case(torch.bfloat16, 24, 24, "layer")
    plain = outcome(case, "layer", False, "half", numerics)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = outcome(case, "layer", False, "half", numerics)
    assert all(same_bits(a, b) for a, b in zip(plain, under, strict=True))


def samples():
    for dtype, norm, across in (
        (torch.float32, "rms", False),
        (torch.float64, "layer", True),
        (torch.bfloat16, "l2", False),
        (torch.float16, "none", False),
    ):
        q, _, parameters, tables = make_case(dtype, 10, 8, None if norm == "none" else norm, shape="heads")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = (t[None].to(wide) for t in tables)
        w, b = (None if (p := parameters.get(n)) is None else p.to(wide).expand(3, 10) for n in ("q_weight", "q_bias"))
        yield "qk_norm_rope", (q, w, b, cos, sin, None, norm, across, 1e-6, "half")
        yield "qk_norm_rope_backward", (torch.randn_like(q), q, w, b, cos, sin, norm, across, 1e-6, "interleaved")
        w, b = parameters.get("q_weight"), parameters.get("q_bias")
        yield "qk_norm_rope_eager", (q, w, b, *tables, norm, across, 1e-6, "interleaved", None)
        yield "qk_norm_rope_eager_backward", (torch.randn_like(q), q, w, b, *tables, norm, across, 1e-6, "half")


def test_opcheck():
    """No test of autograd registration: gradients live in an autograd.Function around the operations."""
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    for name, args in samples():
        torch.library.opcheck(getattr(torch.ops.vqkernels, name).default, args, test_utils=utilities)


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, numerics):
    torch._dynamo.reset()
    q, k, parameters, (cos, sin) = make_case(torch.float32, 24, 16, "rms", shape="scale")

    def call(q, k, q_weight, k_weight):
        return vqkernels.qk_norm_rope(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, numerics=numerics)

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    grads = torch.randn_like(q), torch.randn_like(k)
    actual, expected = (
        with_gradients(lambda q, k, named, f=f: f(q, k, **named), q, k, parameters, grads) for f in (compiled, call)
    )
    for a, e in zip(
        itertools.chain(actual[0], actual[1][:2]), itertools.chain(expected[0], expected[1][:2]), strict=True
    ):
        assert same_bits(a, e)
    for a, e in zip(actual[1][2:], expected[1][2:], strict=True):  # a compiler sums the columns of a scale itself
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


BAD = [
    (
        {"q": torch.zeros(2, 5, 24)},
        ValueError,
        r"q: expected shape \[B, L, H, D\] with H and D at least 1, got \[2, 5, 24\]",
    ),
    ({"q": torch.zeros(2, 5, 3, 24, dtype=torch.int64)}, TypeError, "q: expected a tensor of float32 or"),
    ({"q": None}, TypeError, "q: expected a tensor"),
    ({"k": torch.zeros(2, 5, 2, 20)}, ValueError, r"k: expected shape \[2, 5, Hk, 24\] to match q of shape"),
    ({"k": torch.zeros(2, 6, 2, 24)}, ValueError, r"k: expected shape \[2, 5, Hk, 24\]"),
    (
        {"k": torch.zeros(2, 5, 2, 24).half()},
        TypeError,
        "k: expected dtype torch.float32 to match q, got torch.float16",
    ),
    ({"k": torch.zeros(2, 5, 2, 24, device="meta")}, ValueError, "k: expected device cpu"),
    ({"cos": None}, ValueError, "cos, sin: expected both or neither, got only sin"),
    ({"cos": torch.zeros(5, 24)}, ValueError, r"cos: expected shape \[5, R / 2\] or \[2, 5, R / 2\], one value a pair"),
    ({"cos": torch.zeros(4, 12)}, ValueError, "cos: expected shape"),
    ({"sin": torch.zeros(5, 8)}, ValueError, "sin: expected 12 pairs to match cos, got 8"),
    ({"cos": torch.zeros(5, 12, requires_grad=True)}, ValueError, "cos: expected a constant"),
    ({"cos": torch.zeros(5, 12).double(), "numerics": "eager"}, TypeError, "cos: expected at most float32"),
    ({"norm": "batch"}, ValueError, "norm: expected one of rms, layer, l2, got 'batch'"),
    ({"layout": "pairs"}, ValueError, "layout: expected one of interleaved, half, got 'pairs'"),
    ({"numerics": "fast"}, ValueError, "numerics: expected one of fp32, eager, got 'fast'"),
    ({"across_heads": 1}, TypeError, "across_heads: expected True or False, got 1"),
    ({"eps": -1.0}, ValueError, "eps: expected a number of at least 0, got -1.0"),
    ({"eps": "x"}, TypeError, "eps: expected a number"),
    (
        {"q_weight": torch.zeros(3)},
        ValueError,
        r"q_weight: expected shape \[24\], \[3, 24\], \[3, 1\] or \[\] to match q",
    ),
    ({"q_weight": torch.zeros(72)}, ValueError, "q_weight: expected shape"),
    (
        {"k_weight": torch.zeros(72), "across_heads": True},
        ValueError,
        r"k_weight: expected shape \[48\], \[24\], \[2, 24\]",
    ),
    ({"q_bias": torch.zeros(24)}, ValueError, 'q_bias: expected None without norm="layer", got a value'),
    ({"q_weight": torch.zeros(24), "norm": None}, ValueError, "q_weight: expected None without norm, got a value"),
    ({"k": None, "k_weight": torch.zeros(24)}, ValueError, "k_weight: expected None without k, got a value"),
    ({"backend": "cuda"}, ValueError, "backend: expected None or one of"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_input(options, error, message):
    q, k, _, (cos, sin) = make_case(torch.float32, 24, 24, None)
    with pytest.raises(error, match=message):
        vqkernels.qk_norm_rope(**({"q": q, "k": k, "cos": cos, "sin": sin} | options))


@pytest.mark.parametrize(
    "change",
    [
        {0: torch.zeros(2, 5, 3)},
        {1: torch.zeros(24)},
        {1: torch.zeros(2, 24)},
        {1: torch.zeros(1, 24).double()},
        {3: None},
        {3: torch.zeros(1, 4, 12)},
        {3: torch.zeros(1, 5, 13), 4: torch.zeros(1, 5, 13)},
        {4: torch.zeros(1, 5, 8)},
        {5: torch.zeros(2, 5, 3)},
        {5: torch.ones(2, 5, 3, 1), 6: "layer"},
        {6: "batch"},
        {9: "pairs"},
    ],
)
def test_direct_calls_are_checked(change):
    q, _, _, (cos, sin) = make_case(torch.float32, 24, 24, None)
    args = [q, torch.ones(1, 24), None, cos[None], sin[None], None, "rms", False, 1e-6, "half"]
    torch.ops.vqkernels.qk_norm_rope(*args)
    for place, value in change.items():
        args[place] = value
    with pytest.raises(RuntimeError, match="vqkernels: "):
        torch.ops.vqkernels.qk_norm_rope(*args)
