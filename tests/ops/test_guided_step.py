"""One step of a sampler: against the formula in float64, and with documented coefficients against diffusers."""

import itertools
import math

import pytest
import torch
from budget import assert_within_budget
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from vq_cases import DTYPES, LEVELS, cpu_level, same_bits

import vqkernels
from vqkernels import guided_step

TO_CLEAN, STEP = (1.25, -0.75), (0.6, 0.39)


def expression(sample, output, unconditional=None, **options):
    """The formula in the dtype of the tensors."""
    o = output
    if unconditional is not None:
        o = unconditional + options.get("guidance_scale", 1.0) * (output - unconditional)
        channels = options.get("guided_channels")
        if channels is not None:
            o = torch.cat([o[:, :channels], output[:, channels:]], 1)
    clean = options["to_clean"][0] * sample + options["to_clean"][1] * o
    if options.get("clip") is not None:
        clean = clean.clamp(-options["clip"], options["clip"])
    previous = options["step"][0] * sample + options["step"][1] * clean
    scale = options.get("noise_scale", 0.0)
    if options.get("variance") is not None:
        low, high = options["log_variance"]
        scale = (low + (high - low) * (options["variance"] + 1) / 2).exp().sqrt()
    return previous if options.get("noise") is None else previous + scale * options["noise"]


def cast(options, dtype):
    return {name: v.to(dtype) if isinstance(v, torch.Tensor) else v for name, v in options.items()}


def make_options(shape, dtype=torch.float32):
    """Every kind of step."""
    noise, variance = torch.randn(shape).to(dtype), (2 * torch.rand(shape) - 1).to(dtype)
    guided = {"unconditional": torch.randn(shape).to(dtype), "guidance_scale": 4.0}
    learned = {"noise": noise, "variance": variance, "log_variance": (-4.5, -0.3)}
    for options in (
        {},
        {"clip": 0.7},
        guided,
        guided | {"guided_channels": 1, "clip": 1.0},
        guided | {"guided_channels": 0},
        guided | {"guided_channels": shape[1], "noise": noise, "noise_scale": 0.8},
        guided | learned | {"guided_channels": (shape[1] + 1) // 2, "clip": 1.0},
        learned,
        {"noise": noise},
    ):
        yield {"to_clean": TO_CLEAN, "step": STEP} | options


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(2, 4, 32, 32), (3, 3, 7, 9), (2, 17, 5), (1, 4, 3, 5, 9), (4, 33), (1, 4, 140, 141)]
)
def test_formula(shape, dtype, backend):
    sample, output = torch.randn(2, *shape).to(dtype)
    for options in make_options(shape, dtype):
        wanted = (
            expression(sample, output, **options),
            expression(sample.double(), output.double(), **cast(options, torch.float64)),
        )
        actual = guided_step(sample, output, **options, backend=backend)
        assert_within_budget(actual, *wanted)
        if backend is None and len(shape) > 2:
            last = {name: channels_last(v) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
            for other in (options, last):
                again = guided_step(channels_last(sample), output, **other)
                assert again.stride() == channels_last(sample).stride()
                assert same_bits(again.contiguous(), actual)


def test_float64():
    sample, output = torch.randn(2, 2, 4, 9, 9, dtype=torch.float64)
    for options in make_options(sample.shape, torch.float64):
        exact = expression(sample, output, **options)
        assert (guided_step(sample, output, **options) - exact).abs().max() <= 2.0**-52 * 8 * exact.abs().max().clamp(
            min=1
        )


@pytest.mark.parametrize(("sample_type", "output_type"), list(itertools.product(DTYPES, DTYPES)))
def test_dtypes_meet(sample_type, output_type):
    """Computed in float32, or float64 where it occurs, and rounded once, to the dtype of the sample."""
    shape = (2, 3, 11)
    sample, output = torch.randn(shape).to(sample_type), torch.randn(shape).to(output_type)
    for options in make_options(shape, output_type):
        exact = expression(sample.double(), output.double(), **cast(options, torch.float64))
        for noise_type in (torch.float32, torch.float16):
            given = options | ({"noise": options["noise"].to(noise_type)} if "noise" in options else {})
            exact = expression(sample.double(), output.double(), **cast(given, torch.float64))
            actual = guided_step(sample, output, **given)
            assert actual.dtype == sample_type
            wide = torch.float64 if torch.float64 in (sample_type, output_type) else torch.float32
            allowed = 8 * torch.finfo(wide).eps * (exact.abs() + 16) + torch.finfo(sample_type).eps * exact.abs()
            assert ((actual.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("shape", [(3, 4, 33, 31), (2, 5, 70), (2, 3, 181, 101)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_result_for_all_levels_and_threads(shape, dtype):
    sample, output = torch.randn(2, *shape).to(dtype)
    for options in make_options(shape, dtype):
        results = []
        for level, threads in itertools.product(LEVELS, (1, 3)):
            torch.set_num_threads(threads)
            with cpu_level(level):
                results += [guided_step(sample, output, **options)]
                results += [guided_step(channels_last(sample), output, **options).contiguous()]
        assert all(same_bits(result, results[0]) for result in results)


def test_views_of_a_model_output():
    """Halves over batch and channels, as models with guidance and a learned variance return them."""
    sample, noise = torch.randn(2, 3, 4, 6, 5)
    both = torch.randn(6, 8, 6, 5)
    options = {"to_clean": TO_CLEAN, "step": STEP, "guidance_scale": 2.0, "noise": noise, "log_variance": (-3.0, -1.0)}
    for whole in (both, channels_last(both)):
        x = sample if whole is both else channels_last(sample)
        views = whole[:3, :4], whole[3:, :4]
        actual = guided_step(x, *views, **options, variance=whole[:3, 4:])
        copies = [t.contiguous() for t in (*views, whole[:3, 4:])]
        assert same_bits(actual.contiguous(), guided_step(sample, *copies[:2], **options, variance=copies[2]))
    strided = torch.randn(3, 4, 12, 10)[:, :, ::2, 1::2]
    expanded = torch.randn(1, 4, 1, 1).expand(3, 4, 6, 5)
    options = {"to_clean": TO_CLEAN, "step": STEP}
    actual = guided_step(strided, expanded, **options)
    assert same_bits(actual, guided_step(strided.contiguous(), expanded.contiguous(), **options))
    columns = torch.randn(6, 8).t()
    assert same_bits(
        guided_step(columns, columns, **options), guided_step(columns.contiguous(), columns.contiguous(), **options)
    )


@pytest.mark.parametrize("backend", [None, "reference"])
def test_nan_stays_where_it_is(backend):
    shape = (2, 4, 37)
    for name in ("sample", "output", "unconditional", "noise", "variance"):
        arguments = {"sample": torch.randn(shape), "output": torch.randn(shape), "to_clean": TO_CLEAN, "step": STEP}
        arguments |= {"unconditional": torch.randn(shape), "guidance_scale": 3.0, "clip": 1.0}
        arguments |= {"noise": torch.randn(shape), "variance": torch.zeros(shape), "log_variance": (-2.0, -1.0)}
        arguments[name][1, 2, 5] = torch.nan
        actual = guided_step(**arguments, backend=backend)
        assert actual.isnan().nonzero().tolist() == [[1, 2, 5]]


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (0, 3)])
def test_empty(shape):
    for options in make_options(shape):
        assert guided_step(torch.zeros(shape), torch.zeros(shape), **options).shape == shape


# Its schedulers compute with these in float32: differences of cumulative products keep five digits.
BETAS = torch.linspace(0.02, 0.15, 50)
CUMULATIVE = torch.cumprod(1 - BETAS, 0).tolist()


def to_clean(prediction, a):
    """The docstring's table."""
    return {
        "epsilon": (1 / math.sqrt(a), -math.sqrt(1 - a) / math.sqrt(a)),
        "v_prediction": (math.sqrt(a), -math.sqrt(1 - a)),
        "sample": (0.0, 1.0),
    }[prediction]


def scheduler(kind, prediction, **options):
    return kind(
        50, trained_betas=BETAS.numpy(), prediction_type=prediction, clip_sample=True, clip_sample_range=1.5, **options
    )


@pytest.mark.parametrize("t", [0, 1, 30, 49])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddpm_of_diffusers(prediction, variance_type, t):
    sample, output, other = torch.randn(3, 2, 3, 8, 8)
    given = torch.cat([output, other.clamp(-1, 1)], 1) if variance_type == "learned_range" else output
    expected = scheduler(DDPMScheduler, prediction, variance_type=variance_type).step(
        given, t, sample, generator=torch.Generator().manual_seed(1)
    )
    a, following = CUMULATIVE[t], CUMULATIVE[t - 1] if t else 1.0
    b = 1 - a / following
    small = b * (1 - following) / (1 - a)
    options = {}
    if t:
        options["noise"] = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
        if variance_type == "learned_range":
            options |= {"variance": given[:, 3:], "log_variance": (math.log(small), math.log(b))}
        else:
            options["noise_scale"] = math.sqrt(small if variance_type == "fixed_small" else b)
    step = (math.sqrt(a / following) * (1 - following) / (1 - a), math.sqrt(following) * b / (1 - a))
    actual = guided_step(sample, given[:, :3], to_clean=to_clean(prediction, a), clip=1.5, step=step, **options)
    torch.testing.assert_close(actual, expected.prev_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_of_diffusers(prediction, eta):
    sample, output, noise = torch.randn(3, 2, 3, 8, 8)
    reference = scheduler(DDIMScheduler, prediction)
    reference.set_timesteps(10)
    for t in (5, 25, 45):
        expected = reference.step(output, t, sample, eta=eta, use_clipped_model_output=True, variance_noise=noise)
        a, following = CUMULATIVE[t], CUMULATIVE[t - 5]
        s = eta * math.sqrt((1 - following) / (1 - a)) * math.sqrt(1 - a / following)
        q = math.sqrt((1 - following - s**2) / (1 - a))
        actual = guided_step(
            sample,
            output,
            to_clean=to_clean(prediction, a),
            clip=1.5,
            step=(q, math.sqrt(following) - q * math.sqrt(a)),
            noise=noise,
            noise_scale=s,
        )
        torch.testing.assert_close(actual, expected.prev_sample, rtol=1e-4, atol=1e-4)


def test_euler_flow_of_diffusers():
    reference = FlowMatchEulerDiscreteScheduler()
    reference.set_timesteps(8)
    sample = torch.randn(2, 4, 6, 6)
    x = sample
    for i, timestep in enumerate(reference.timesteps):
        velocity = torch.randn_like(x)
        t, following = reference.sigmas[i].item(), reference.sigmas[i + 1].item()
        sample = reference.step(velocity, timestep, sample).prev_sample
        x = guided_step(x, velocity, to_clean=(1.0, -t), step=(following / t, 1 - following / t))
        torch.testing.assert_close(x, sample, rtol=1e-5, atol=1e-5)


def test_guidance_of_facebook_dit():
    """forward_with_cfg guides the first three of four channels, the others are the conditional ones."""
    sample, output, unconditional = torch.randn(3, 2, 4, 5, 5)
    actual = guided_step(
        sample, output, unconditional, guidance_scale=4.0, guided_channels=3, to_clean=(0.0, 1.0), step=(0.0, 1.0)
    )
    torch.testing.assert_close(actual[:, :3], unconditional[:, :3] + 4 * (output - unconditional)[:, :3])
    assert torch.equal(actual[:, 3], output[:, 3])


def test_no_gradient():
    sample, output = torch.randn(2, 2, 4, 3, requires_grad=True)
    for backend in (None, "reference"):
        with pytest.raises(RuntimeError, match="guided_step has no gradient"):
            guided_step(sample.detach(), output, to_clean=TO_CLEAN, step=STEP, backend=backend)
        with torch.no_grad():
            guided_step(sample, output, to_clean=TO_CLEAN, step=STEP, backend=backend)


def test_opcheck_and_compile():
    sample, output = torch.randn(2, 2, 4, 6, 5)
    numbers = (2.0, *TO_CLEAN, 1.0, *STEP, 0.0, -3.0, -1.0)
    rows = torch.randn(5, 2, 120)
    torch.library.opcheck(torch.ops.vqkernels.guided_step.default, (*rows, 120, 60, *numbers))
    strided = torch.randn(2, 240)[:, ::2]
    torch.library.opcheck(torch.ops.vqkernels.guided_step.default, (strided, strided, None, None, None, 4, 4, *numbers))
    for options in list(make_options(sample.shape))[3::3]:
        for x in (sample, channels_last(sample)):
            torch.compiler.reset()
            compiled = torch.compile(lambda a, b, **given: guided_step(a * 2, b, **given) + 1, fullgraph=True)
            assert torch.equal(compiled(x, output, **options), guided_step(x * 2, output, **options) + 1)


X = torch.zeros(2, 4, 3)
GOOD = {"sample": X, "output": X, "to_clean": TO_CLEAN, "step": STEP}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sample": X.int()}, TypeError, "sample: expected a tensor of float32"),
        ({"sample": X[0, 0], "output": X[0, 0]}, ValueError, r"sample: expected shape \[B, C, ...\]"),
        ({"output": torch.zeros(2, 8, 3)}, ValueError, r"output: expected shape \[2, 4, 3\] to match sample"),
        ({"unconditional": X[:1]}, ValueError, r"unconditional: expected shape \[2, 4, 3\]"),
        ({"noise": [1]}, TypeError, "noise: expected a tensor"),
        ({"to_clean": 1.0}, TypeError, "to_clean: expected two numbers, got float 1.0"),
        ({"step": (1.0, 2.0, 3.0)}, TypeError, "step: expected two numbers"),
        ({"step": (1.0, "x")}, TypeError, r"step\[1\]: expected a number"),
        ({"clip": 0}, ValueError, "clip: expected a number above 0, got 0"),
        ({"guidance_scale": 2.0}, ValueError, "guidance_scale: expected 1 without unconditional, got 2.0"),
        ({"guided_channels": 5}, ValueError, "guided_channels: expected an integer from 0 to 4, got 5"),
        ({"guided_channels": 2.0}, TypeError, "guided_channels: expected None or an integer"),
        ({"noise_scale": 0.5}, ValueError, "noise_scale: expected 0 without noise, got 0.5"),
        ({"variance": X, "noise": X}, ValueError, "variance, log_variance: expected both"),
        ({"log_variance": (0.0, 1.0)}, ValueError, "variance, log_variance: expected both"),
        ({"variance": X, "log_variance": (0.0, 1.0)}, ValueError, "variance: expected only with noise"),
        (
            {"variance": X, "noise": X, "log_variance": (0.0, 1.0), "noise_scale": 1.0},
            ValueError,
            "noise_scale: expected 0 with variance, got 1.0",
        ),
        ({"backend": "cuda"}, ValueError, "backend: expected None or one of"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        guided_step(**GOOD | changes)


def test_direct_calls_are_safe():
    op, x, numbers = torch.ops.vqkernels.guided_step, torch.zeros(2, 12), (1.0,) * 9
    for arguments in (
        (x[0], x[0], None, None, None, 12, 12),
        (x, x[:, :6], None, None, None, 12, 12),
        (x, x, x[:1], None, None, 12, 12),
        (x, x, None, x.double(), None, 12, 12),
        (x, x, None, None, x, 12, 12),
        (x, x.double(), None, None, None, 12, 12),
        (x, x, x, None, None, 0, 0),
        (x, x, x, None, None, 12, 13),
        (x, x, x, None, None, 12, -1),
    ):
        with pytest.raises(RuntimeError, match="vqkernels:"):
            op(*arguments, *numbers)


def test_reference_is_exported():
    actual = vqkernels.reference.guided_step(X, X + 1, to_clean=(0.0, 1.0), step=(0.0, 1.0))
    assert torch.equal(actual, X + 1)
