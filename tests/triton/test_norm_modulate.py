"""Triton's normalization and modulation, with and without a gated branch: against the formulas in float64."""

import pytest
import torch
from budget import assert_within_budget
from norm_chain import NAMES, problem, with_gradients

import vqkernels
from vqkernels.triton import row_sums
from vqkernels.triton.gate_residual_norm_modulate import (
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_backward,
)
from vqkernels.triton.norm_modulate import norm_modulate, norm_modulate_backward

EPS = 1e-5
MODULATIONS = NAMES[2:7]


def run(inputs, grads, norm, layout, device):
    """What the kernels give: results as of `chain`, gradients by name; `grads` of residual, y, y2."""
    t = {name: inputs[name].to(device) if name in inputs else None for name in NAMES}
    grads = [None if g is None else g.to(device) for g in grads]
    modulations = [t[name] for name in MODULATIONS[1:]]
    layouts = [layout if t[name] is not None else 0 for name in MODULATIONS]
    affine = (t["weight"], t["bias"], norm, EPS)
    two = grads[2] is not None
    if t["branch"] is None:
        y, y2, mean, rstd = norm_modulate(t["x"], *modulations, *affine, two)
        gradients = norm_modulate_backward(
            *(grads[1], grads[2], t["x"], t["scale"], t["scale2"], *affine[:2], mean, rstd, norm, layouts[1:], True)
        )
        names = ("x", *NAMES[3:])
        results = (t["x"], y, y2)
    else:
        *results, mean, rstd = gate_residual_norm_modulate(t["x"], t["branch"], t["gate"], *modulations, *affine, two)
        gradients = gate_residual_norm_modulate_backward(
            *(*grads, t["x"], t["branch"], t["gate"], t["scale"], t["scale2"], *affine[:2], mean, rstd, norm),
            *(layouts, True),
        )
        names = NAMES
    assert mean.shape == ((0,) if norm == "rms" else t["x"].shape[:2])
    gradients = dict(zip(names, gradients, strict=True))
    for name in names:
        if t[name] is None:
            assert gradients[name].shape == (0,)
    return [r.cpu() for r in results], {k: gradients[k].cpu() for k in names if t[k] is not None}


def assert_exact(inputs, norm, layout, device, grads=(True, True, True)):
    x = inputs["x"]
    dtype = x.dtype
    grads = [torch.randn(x.shape).to(dtype) if wanted else None for wanted in grads]
    results, gradients = run(inputs, grads, norm, layout, device)
    expression, truth = (with_gradients(inputs, grads, norm, EPS, d) for d in (dtype, torch.float64))
    for i, grad in enumerate(grads):
        if i == 0 or grad is not None:
            assert_within_budget(results[i], expression[0][i], truth[0][i])
        else:
            assert results[i].shape == (0,)
    for name, gradient in gradients.items():
        assert_within_budget(gradient, expression[1][name], truth[1][name])


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("layout", [1, 2, 3])
@pytest.mark.parametrize("branch", [True, False])
def test_values_and_gradients(branch, layout, norm, device):
    without = () if branch else ("branch", "gate")
    for batch, length, dim in ((3, 6, 24), (1, 7, 65), (9, 1, 32)):
        assert_exact(problem(batch, length, dim, layout, without=without), norm, layout, device, (branch, True, True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, device):
    inputs = problem(2, 5, 33, 2, dtype, without=("shift2", "scale2"))
    grads = [torch.randn(2, 5, 33).to(dtype) for _ in range(2)] + [None]
    results, gradients = run(inputs, grads, "layer", 2, device)
    expression, truth = (with_gradients(inputs, grads, "layer", EPS, d) for d in (dtype, torch.float64))
    assert_within_budget(results[:2], expression[0][:2], truth[0][:2])
    for name, gradient in gradients.items():
        assert_within_budget(gradient, expression[1][name], truth[1][name])


def test_double_precision(device):
    """The formulas in float64 are no better than the kernels: both round some hundred times, none more than a sum."""
    inputs = problem(2, 5, 33, 2, torch.float64)
    grads = list(torch.randn(3, 2, 5, 33, dtype=torch.float64))
    results, gradients = run(inputs, grads, "layer", 2, device)
    truth = with_gradients(inputs, grads, "layer", EPS, torch.float64)
    pairs = [*zip(results, truth[0], strict=True), *((gradients[k], truth[1][k]) for k in gradients)]
    for actual, exact in pairs:
        assert actual.dtype == torch.float64
        assert ((actual - exact).abs() <= 300 * 2.0**-53 * exact.abs().max()).all()


@pytest.mark.parametrize("without", [("shift",), ("scale",), ("weight",), ("bias",), MODULATIONS[1:], NAMES[1:]])
def test_what_is_left_out(without, device):
    inputs = problem(2, 6, 12, 2, without=without)
    assert_exact(inputs, "layer", 2, device, ("branch" in inputs, True, True))
    for name in ("shift2", "scale2"):
        inputs.pop(name, None)
    assert_exact(inputs, "rms", 2, device, (False, True, False))


@pytest.mark.parametrize(("batch", "length"), [(15, 2), (1, 26), (3, 6)])
def test_many_rows(batch, length, device, monkeypatch):
    """More rows than programs: all of one item, some of one item, those of several items."""
    monkeypatch.setattr(row_sums, "_PROGRAMS", 4)
    for layout in (1, 2):
        inputs = problem(batch, length, 24, layout, without=("shift2", "scale2", "weight"))
        assert_exact(inputs, "layer", layout, device, (True, True, False))


def test_partial_rows_are_few():
    """At most 1024, and one a batch item more."""
    for batch in (1, 3, 1023, 1025, 5000):
        for length in (1, 5, 255, 4097):
            chunks = row_sums.chunks_of(batch, length)
            assert chunks.programs <= 1024 + batch
            assert batch * chunks.per_item <= 1024 + batch
            assert chunks.items == 1 or (chunks.per_item == 1 and chunks.rows == length)
            assert chunks.rows * chunks.per_item >= length
            assert chunks.items * (chunks.programs // chunks.per_item) >= batch


def test_wide_rows(device):
    inputs = problem(1, 2, 8193, 2, without=("shift2", "scale2", "weight", "bias"))
    assert_exact(inputs, "layer", 2, device, (True, True, False))


def test_one_column(device):
    """Its layer norm is 0, so that the bias is modulated, and nothing but the residual has a gradient."""
    inputs = problem(2, 3, 1, 2)
    grads = list(torch.randn(3, 2, 3, 1))
    results, gradients = run(inputs, grads, "layer", 2, device)
    expected = inputs["bias"] * (1 + inputs["scale"]) + inputs["shift"]
    torch.testing.assert_close(results[1], expected.expand(2, 3, 1))
    assert torch.equal(gradients["x"], grads[0])


def test_mean_far_from_zero(device):
    """Where the mean is 1e4 times the deviation, a variance from squares would have no digit left."""
    inputs = problem(2, 4, 384, 2, without=NAMES[1:])
    inputs["x"] += 1e4
    assert_exact(inputs, "layer", 2, device, (False, True, False))


def test_partial_rows_are_added_in_float64(device):
    """Rounded once, to the type of the gradient; 2^24 and the ones after it would stay 2^24 in float32."""
    x = torch.zeros(1, 1, 5, dtype=torch.float16, device=device)
    partials = torch.ones(1000, 5, device=device)
    assert row_sums.finished_sums(x, partials, row_sums.OF_ALL, torch.float16).flatten().tolist() == [1000.0] * 5
    partials[0] = 2.0**24
    assert (
        row_sums.finished_sums(x, partials, row_sums.OF_ALL, torch.float32).flatten().tolist()
        == [
            2.0**24 + 1000  # the even neighbour of 2^24 + 999
        ]
        * 5
    )


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_empty(shape, device):
    for layout in (1, 2, 3):
        inputs = problem(*shape, layout)
        results, gradients = run(inputs, [torch.zeros(shape)] * 3, "layer", layout, device)
        assert all(r.shape == shape for r in results)
        for name, gradient in gradients.items():
            assert gradient.shape == inputs[name].shape
            assert not gradient.any()


def test_views(device):
    """Rows of any strides, columns of any, expanded gradients: bitwise what contiguous copies give."""
    inputs = problem(2, 6, 10, 2)
    views = dict(inputs)
    views["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    views["branch"] = inputs["branch"].transpose(1, 2).contiguous().transpose(1, 2)
    views["gate"] = inputs["gate"].repeat_interleave(2, -1)[..., ::2]
    grad = torch.randn(1, 1, 10).expand(2, 6, 10)
    for a, b in zip(
        run(inputs, [grad.contiguous()] * 3, "layer", 2, device),
        run(views, [grad] * 3, "layer", 2, device),
        strict=True,
    ):
        pairs = zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("second", [False, True])
def test_public_functions(second, device):
    """Through autograd, with modulations [B, D] of another dtype."""
    x, branch = torch.randn(2, 3, 5, 16, device=device).half().requires_grad_(), torch.randn(3, 5, 16, device=device)
    shift, scale, gate = (torch.randn(3, 16, device=device).requires_grad_() for _ in range(3))
    options = {"second": (shift, scale) if second else None, "norm": "rms", "eps": EPS}
    outcomes = []
    for backend in ("triton", "reference"):
        results = vqkernels.gate_residual_norm_modulate(
            x[0], branch.half(), gate, shift, scale, **options, backend=backend
        )
        loss = sum((r.float() * torch.arange(16, device=device)).square().mean() for r in results)
        outcomes.append([*results, *torch.autograd.grad(loss, (x, shift, scale, gate))])
    for actual, expected in zip(*outcomes, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_direct_calls_check_shapes(device):
    t = {k: v.to(device) for k, v in problem(2, 3, 4, 2).items()}
    modulations = [t[name] for name in MODULATIONS[1:]]
    for change in ({"x": t["x"][0]}, {"branch": t["branch"][:1]}, {"gate": t["gate"][..., :3]}):
        changed = t | change
        with pytest.raises(ValueError, match=rf"^{next(iter(change))}: expected shape"):
            gate_residual_norm_modulate(
                *(changed["x"], changed["branch"], changed["gate"], *modulations, None, None, "layer", EPS, False)
            )
    with pytest.raises(RuntimeError, match="unknown norm batch"):
        norm_modulate(t["x"], *modulations, None, None, "batch", EPS, False)
    _, _, mean, rstd = norm_modulate(t["x"], *modulations, None, None, "layer", EPS, False)
    good = [t["x"], None, t["x"], t["scale"], None, None, None, mean, rstd, "layer", [2, 2, 0, 0], False]
    for place, wrong, message in (
        (0, t["x"][:1], "^grad_y: expected shape"),
        (3, t["scale"][:, :, :2], "^scale: expected shape"),
        (7, mean[:1], "^mean: expected shape"),
        (8, rstd[:, :2], "^rstd: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            norm_modulate_backward(*good[:place], wrong, *good[place + 1 :])
    with pytest.raises(RuntimeError, match="unknown layouts"):
        norm_modulate_backward(*good[:10], [4, 0, 0, 0], False)


@pytest.mark.parametrize(("capability", "dtype", "dim"), [(80, torch.float32, 1152), (90, torch.bfloat16, 3072)])
def test_compiles(capability, dtype, dim, compiled, tmp_path):
    programs = compiled(capability)
    for norm in ("layer", "rms"):
        inputs = problem(2, 3, dim, 2, dtype)
        run(inputs, [inputs["x"]] * 3, norm, 2, "cpu")
        run({"x": inputs["x"]}, [None, inputs["x"], None], norm, 2, "cpu")
    assert {key[0] for key in programs} == {
        "_norm_modulate_kernel",
        "_norm_modulate_backward_kernel",
        "_sum_partials_kernel",
    }
    for program in programs.values():
        assert "atom." not in program.ptx
        assert "red.global" not in program.ptx


@pytest.mark.parametrize(("capability", "dtype", "dim"), [(80, torch.float32, 1152), (90, torch.bfloat16, 3072)])
def test_registers_hold_a_row(capability, dtype, dim, compiled, tmp_path):
    """With what a diffusion transformer has: a gate and one modulation a batch item."""
    programs = compiled(capability)
    inputs = problem(2, 3, dim, 2, dtype, without=("shift2", "scale2", "weight", "bias"))
    run(inputs, [inputs["x"], inputs["x"], None], "layer", 2, "cpu")
    assert len(programs) == 3
    assert all(program.registers_and_stack(tmp_path)[1] == 0 for program in programs.values())


@pytest.mark.parametrize("dim", [8192, 12288])
def test_wide_rows_compile(dim, compiled, tmp_path):
    programs = compiled(90)
    inputs = problem(1, 3, dim, 2, torch.bfloat16)
    run(inputs, [inputs["x"]] * 3, "layer", 2, "cpu")
    assert max(p.shared for p in programs.values()) <= 48 * 1024
