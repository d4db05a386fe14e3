"""The block of diffusion transformers: the reference beside its formulas, the fused one beside the reference."""

import copy
import inspect
import math
import re

import pytest
import torch
from budget import assert_rms_within_budget
from twins import assert_fused_within_budget, initialized, kept_bytes, run

import vqkernels.nn
from vqkernels import reference

OPTIONS = {
    "published": {},
    "rms swiglu": {"qk_norm": "rms", "mlp": "swiglu"},
    "layer": {"qk_norm": "layer", "mlp_ratio": 2.5},
    "context": {"cross_attention_dim": 20, "qk_norm": "rms"},
}
DIM, HEADS, LENGTH = 48, 4, 21


def twins(numerics="fp32", dim=DIM, heads=HEADS, **options):
    plain = initialized(reference.DiTBlock(dim, heads, **options))
    fused = vqkernels.nn.DiTBlock(dim, heads, **options, numerics=numerics)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def arguments(options, length=LENGTH, dim=DIM, per_token=False, dtype=torch.float32):
    """Of a block: x, c, and by name a rotation and a context where the options have one."""
    x = torch.randn(3, length, dim, dtype=dtype)
    c = torch.randn(3, *([length] if per_token else []), dim, dtype=dtype)
    more = {}
    if "qk_norm" in options:
        more["rope"] = reference.rope_tables((3, length // 3), dim // HEADS)
    if "cross_attention_dim" in options:
        more["context"] = torch.randn(3, 5, 20, dtype=dtype)
        more["context_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    return (x, c), more


def by_formula(block, x, c, rope=None, context=None, context_mask=None):
    """The block in the formulas of the papers: sums over heads, and pairs of dimensions as complex numbers."""
    state = block.state_dict()

    def linear(name, value):
        return torch.einsum("...i,oi->...o", value, state[f"{name}.weight"]) + state[f"{name}.bias"]

    def norm(value):
        centred = value - value.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def head_norm(name, value):
        if block.attn.qk_norm == "layer":
            return norm(value) * state[f"{name}.weight"] + state[f"{name}.bias"]
        if block.attn.qk_norm == "rms":
            return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]
        return value

    def turned(value):
        if rope is None:
            return value
        pairs = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous())
        angles = torch.complex(*(t.double() for t in rope))[:, None]
        return torch.view_as_real(pairs * angles).flatten(-2)

    def attended(q, k, v, mask=None):
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (q, k, v))
        if mask is None:
            q, k = turned(head_norm("attn.q_norm", q)), turned(head_norm("attn.k_norm", k))
        scores = torch.einsum("blhd,bshd->bhls", q, k) / math.sqrt(q.shape[-1])
        weights = scores.exp() if mask is None else scores.exp() * mask[:, None, None]
        return torch.einsum("bhls,bshd->blhd", weights / weights.sum(-1, keepdim=True), v).flatten(2)

    modulation = linear("adaLN_modulation.1", c * torch.sigmoid(c))
    shift1, scale1, gate1, shift2, scale2, gate2 = (modulation if c.ndim == 3 else modulation[:, None]).chunk(6, -1)
    y = norm(x) * (1 + scale1) + shift1
    x = x + gate1 * linear("attn.proj", attended(*linear("attn.qkv", y).chunk(3, -1)))
    if context is not None:
        branch = attended(
            linear("cross_attn.q_linear", x), *linear("cross_attn.kv_linear", context).chunk(2, -1), context_mask
        )
        x = x + linear("cross_attn.proj", branch)
    y = norm(x) * (1 + scale2) + shift2
    if "mlp.w12.weight" in state:
        a, b = linear("mlp.w12", y).chunk(2, -1)
        return x + gate2 * linear("mlp.w3", a * torch.sigmoid(a) * b)
    z = linear("mlp.fc1", y)
    z = z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
    return x + gate2 * linear("mlp.fc2", z)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reference_is_the_formula(options, per_token):
    block = twins(**options)[0].double()
    inputs, more = arguments(options, per_token=per_token, dtype=torch.float64)
    expected = by_formula(block, *inputs, **more)
    assert (block(*inputs, **more) - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fused_within_budget(options, per_token):
    inputs, more = arguments(options, per_token=per_token)
    assert_fused_within_budget(*twins(**options), *inputs, **more)


@pytest.mark.parametrize("length", [1, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_within_budget_in_half_precision(dtype, length):
    plain, fused = (block.to(dtype) for block in twins())
    inputs, _ = arguments({}, length=length, dtype=dtype)
    assert_fused_within_budget(plain, fused, *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_eager_is_the_reference_to_the_bit(options, dtype):
    plain, fused = (block.to(dtype) for block in twins("eager", **options))
    inputs, more = arguments(options, dtype=dtype)
    assert all(map(torch.equal, run(fused, *inputs, **more), run(plain, *inputs, **more)))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_state_dict_is_the_reference_s(options):
    plain, fused = twins(**options)
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert isinstance(fused, reference.DiTBlock)


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stack_carries_the_stream(numerics, dtype):
    """Three blocks and the last layer, each residual added by the next norm: as one after the other."""
    blocks = [twins(numerics)[1].to(dtype) for _ in range(3)]
    last = initialized(vqkernels.nn.FinalLayer(DIM, 2, 4, numerics=numerics)).to(dtype)
    (x, c), _ = arguments({}, dtype=dtype)
    expected = x
    stream = x, None, None
    for block in blocks:
        expected = block(expected, c)
        stream = block.advance(stream, block.adaLN_modulation(c))
    expected, actual = last(expected, c), last.advance(stream, last.adaLN_modulation(c))
    if numerics == "eager" or dtype == torch.float32:
        assert torch.equal(actual, expected)
    else:  # the norm is that of the sum before it is rounded
        assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


def test_keeps_less_for_the_backward_pass():
    """DiT-S/2 at B = 8: 60.2 MiB become 51.2; norms and modulations leave nothing but their inputs."""
    plain, fused = twins(dim=384, heads=6)
    x, c = torch.randn(8, 256, 384, requires_grad=True), torch.randn(8, 384, requires_grad=True)
    tensor = x.numel() * 4
    before, after = kept_bytes(plain, x, c), kept_bytes(fused, x, c)
    assert before > 19 * tensor  # in units of [B, L, D]: x, 7 of the attention, 9 of the MLP, 2 norms
    assert after < 17.1 * tensor


def test_repeats_for_any_number_of_threads():
    _, fused = twins(dim=96)
    inputs, _ = arguments({}, length=64, dim=96)
    runs = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        runs.append(run(fused, *inputs))
    assert all(map(torch.equal, runs[0], runs[2]))
    # torch's own matrix products may add up in another order on more threads.
    for one, two in zip(runs[0], runs[1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_compiles_whole(numerics):
    _, fused = twins(numerics, qk_norm="rms")
    inputs, more = arguments({"qk_norm": "rms"})
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, *inputs, **more), run(fused, *inputs, **more), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
def test_autocast(numerics):
    plain, fused = twins(numerics)
    exact = copy.deepcopy(plain).double()

    def draw():
        inputs, _ = arguments({})
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = run(fused, *inputs), run(plain, *inputs)
        if numerics == "eager":
            assert all(map(torch.equal, actual, expected))
        return actual, expected, run(exact, *(t.double() for t in inputs))

    assert_rms_within_budget(draw() for _ in range(4))


@pytest.mark.parametrize("fusing", [False, True])
def test_both_attentions_are_the_operation(fusing, monkeypatch):
    """As torch has no fast kernel for every size of a head on a GPU; "eager" is torch's own everywhere."""
    calls = []
    whole = vqkernels.attention
    monkeypatch.setattr("vqkernels.ops.attention", lambda *t, **o: calls.append(o) or whole(*t, **o))
    for numerics, expected in (("fp32", 2), ("eager", 0)):
        plain, fused = twins(numerics, cross_attention_dim=20)
        if fusing:
            fused = copy.deepcopy(plain)
            vqkernels.fuse(fused, numerics=numerics, verbose=False)
        inputs, more = arguments({"cross_attention_dim": 20})
        more["context_mask"][2] = False  # nothing to attend to
        calls.clear()
        actual = fused(*inputs, **more)
        assert len(calls) == expected
        assert [options["mask"].shape for options in calls if options] == [(3, 1, 1, 5)] * (expected // 2)
        torch.testing.assert_close(actual, plain(*inputs, **more))


@pytest.mark.parametrize("kind", ["DiTBlock", "FinalLayer"])
@pytest.mark.parametrize("of", ["reference", "nn", "fuse"])
def test_bad_conditions(kind, of):
    layer = getattr(vqkernels.nn if of == "nn" else reference, kind)(48, 4, 4)
    if of == "fuse":
        vqkernels.fuse(layer, verbose=False)
    x = torch.randn(2, 7, 48)
    for shape in [(2, 47), (3, 48), (48,), (2, 6, 48), (2, 7, 1, 48)]:
        expected = f"c: expected shape [2, 48] or [2, 7, 48] to match x of shape [2, 7, 48], got {list(shape)}"
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            layer(x, torch.randn(shape))
    with pytest.raises(TypeError, match=r"c: expected a tensor of float32 or .* got None"):
        layer(x, None)
    with pytest.raises(ValueError, match=r"x: expected shape \[B, L, 48\], got \[2, 7, 40\]"):
        layer(x[..., :40], torch.randn(2, 48))
    for shape in [(1, 48), (2, 1, 48), (1, 7, 48)]:
        assert layer(x, torch.randn(shape)).shape[:2] == (2, 7)


@pytest.mark.parametrize("name", ["DiTBlock", "FinalLayer"])
def test_signatures_are_the_reference_s(name):
    plain = inspect.signature(getattr(reference, name)).parameters
    fused = dict(inspect.signature(getattr(vqkernels.nn, name)).parameters)
    assert fused.pop("numerics").default == "fp32"
    assert fused == plain


@pytest.mark.parametrize("layer", [vqkernels.nn.DiTBlock, reference.DiTBlock])
def test_bad_arguments(layer):
    with pytest.raises(ValueError, match="num_heads: expected a divisor of 48, got 5"):
        layer(48, 5)
    with pytest.raises(ValueError, match="mlp_ratio: expected at least 2 / 48, got -1"):
        layer(48, 4, -1)
    with pytest.raises(ValueError, match="context: expected None without cross_attention_dim, got Tensor"):
        layer(48, 4)(torch.randn(1, 2, 48), torch.randn(1, 48), context=torch.randn(1, 2, 48))
    with pytest.raises(ValueError, match="context: expected a context, got NoneType"):
        layer(48, 4, cross_attention_dim=8)(torch.randn(1, 2, 48), torch.randn(1, 48))


def test_bad_numerics():
    for layer in (vqkernels.nn.DiTBlock, vqkernels.nn.FinalLayer, vqkernels.nn.SpatialTransformer):
        with pytest.raises(ValueError, match="numerics: expected one of fp32, eager, got 'fast'"):
            layer(64, 2, 2, numerics="fast")
