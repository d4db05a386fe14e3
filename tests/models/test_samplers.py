"""Samplers step by step beside diffusers' schedulers, and on Gaussian data, whose exact paths are known."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from vqkernels.models import Diffusion, DiT, sample

SHAPE = (3, 2, 4, 4)
THEIR_NAMES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def wave(x, t):
    """Stands for a model: bounded, and different everywhere."""
    return torch.sin(3 * x + t.reshape(-1, 1, 1, 1) / 100)


def learned_wave(x, t):
    return torch.cat([wave(x, t), torch.cos(2 * x)], 1)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("prediction", THEIR_NAMES)
def test_ddpm_is_that_of_diffusers(prediction, learned, clip):
    diffusion = Diffusion(prediction=prediction, learned_sigma=learned)
    model = learned_wave if learned else wave
    actual = sample(diffusion, model, SHAPE, method="ddpm", steps=20, clip=clip, generator=seeded())

    scheduler = DDPMScheduler(
        beta_schedule="linear",
        prediction_type=THEIR_NAMES[prediction],
        variance_type="learned_range" if learned else "fixed_small",
        clip_sample=clip is not None,
    )
    scheduler.set_timesteps(timesteps=diffusion.respaced(20)[::-1])
    generator = seeded()
    x = torch.randn(SHAPE, generator=generator)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t[None]), t, x, generator=generator).prev_sample
    # The range of a learned variance begins at the posterior's of the first timestep, where diffusers clamps at 1e-20.
    torch.testing.assert_close(actual, x, rtol=2e-3, atol=2e-3)
    assert x.std() > 0.1


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", THEIR_NAMES)
def test_ddim_is_that_of_diffusers(prediction, eta):
    diffusion = Diffusion(timesteps=40, prediction=prediction)
    actual = sample(diffusion, wave, SHAPE, method="ddim", steps=40, eta=eta, clip=1.0, generator=seeded())
    scheduler = DDIMScheduler(
        40, 25e-4, 0.5, "linear", prediction_type=THEIR_NAMES[prediction], clip_sample=True, set_alpha_to_one=True
    )
    scheduler.set_timesteps(40)
    generator = seeded()
    x = torch.randn(SHAPE, generator=generator)
    for t in scheduler.timesteps:
        options = {"eta": eta, "use_clipped_model_output": True, "generator": generator}
        x = scheduler.step(wave(x, t[None]), t, x, **options).prev_sample
    torch.testing.assert_close(actual, x, rtol=2e-3, atol=2e-3)


def test_ddim_takes_timesteps_evenly():
    """On some of the timesteps it is that of a diffusion that has no others."""
    diffusion = Diffusion()
    kept = diffusion.respaced(7)
    squared = torch.tensor([1.0, *(diffusion.signal[t].item() ** 2 for t in kept)], dtype=torch.float64)
    scheduler = DDIMScheduler(7, trained_betas=(1 - squared[1:] / squared[:-1]).numpy(), clip_sample=False)
    scheduler.set_timesteps(7)
    x = torch.randn(SHAPE, generator=seeded())
    for t in scheduler.timesteps:
        x = scheduler.step(wave(x, torch.tensor([kept[t]])), t, x).prev_sample
    actual = sample(diffusion, wave, SHAPE, method="ddim", steps=7, generator=seeded())
    torch.testing.assert_close(actual, x, rtol=1e-3, atol=1e-3)
    assert torch.equal(sample(diffusion, wave, SHAPE, method="euler", steps=7, generator=seeded()), actual)


def test_euler_of_a_flow_is_that_of_diffusers():
    diffusion = Diffusion(prediction="flow")
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - i / 12 for i in range(12)])
    x = torch.randn(SHAPE, generator=seeded())
    for t in scheduler.timesteps:
        x = scheduler.step(wave(x, t[None]), t, x).prev_sample
    actual = sample(diffusion, wave, SHAPE, method="euler", steps=12, generator=seeded())
    torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-4)


class GaussianModel:
    """What the best model says of data from N(0, deviation^2): all means are linear in x."""

    def __init__(self, diffusion, deviation=0.3):
        self.diffusion, self.deviation = diffusion, deviation

    def levels(self, t):
        return (v.reshape(-1, 1, 1, 1) for v in self.diffusion.levels(t))

    def __call__(self, x, t):
        a, s = self.levels(t)
        clean = a * self.deviation**2 / (a**2 * self.deviation**2 + s**2) * x.double()
        noise = s / (a**2 * self.deviation**2 + s**2) * x.double()
        outputs = {"epsilon": noise, "x0": clean, "v": a * noise - s * clean, "flow": noise - clean}
        return outputs[self.diffusion.prediction].float()


def path_error(method, prediction, steps):
    """Largest error of a path from noise to data against the exact solution, which scales x by its deviation."""
    diffusion = Diffusion(prediction=prediction)
    model = GaussianModel(diffusion)
    x = sample(diffusion, model, SHAPE, method=method, steps=steps, generator=seeded())
    noise = torch.randn(SHAPE, generator=seeded())
    first = diffusion.timesteps if diffusion.is_flow else diffusion.timesteps - 1
    a, s = (v.item() for v in diffusion.levels(torch.tensor(first)))
    exact = noise * model.deviation / math.sqrt(a**2 * model.deviation**2 + s**2)
    return ((x - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
def test_order_of_accuracy(prediction):
    """Twice the steps: half of Euler's error, and about a quarter of Heun's."""
    euler = [path_error("euler", prediction, steps) for steps in (20, 40, 80)]
    heun = [path_error("heun", prediction, steps) for steps in (20, 40, 80)]
    assert euler[2] < 0.1
    assert heun[1] < euler[1]
    assert 1.6 < euler[0] / euler[1] < 2.6
    assert heun[0] / heun[1] > 2.6


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ddpm", {"steps": 1000}),
        ("ddim", {"eta": 1.0, "steps": 1000}),
        ("ddim", {"steps": 100}),
        ("heun", {"steps": 30}),
    ],
)
def test_samples_have_the_deviation_of_the_data(method, options):
    diffusion = Diffusion(schedule="cosine")
    x = sample(diffusion, GaussianModel(diffusion), (8, 4, 16, 16), method=method, generator=seeded(), **options)
    assert x.mean().abs() < 5 * 0.3 / math.sqrt(x.numel())
    assert x.std().item() == pytest.approx(0.3, rel=0.05)


def labelled(x, t, y):
    return torch.sin(3 * x + y.reshape(-1, 1, 1, 1))


labelled.num_classes = 5


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("method", "calls"), [("ddpm", 6), ("ddim", 6), ("euler", 6), ("heun", 11)])
def test_guidance_is_one_call_for_both(method, calls, learned):
    diffusion, y, seen = Diffusion(learned_sigma=learned), torch.tensor([1, 2, 3]), []

    def variance(x):
        return [torch.cos(2 * x)] if learned else []

    def model(x, t, y):
        seen.append((x.shape[0], y.tolist()))
        return torch.cat([labelled(x, t, y), *variance(x)], 1)

    def guided(x, t, y):
        conditional, unconditional = labelled(x, t, y), labelled(x, t, torch.full_like(y, 5))
        outputs = unconditional + 3.0 * (conditional - unconditional)
        return torch.cat([outputs[:, :1], conditional[:, 1:], *variance(x)], 1)

    options = {"method": method, "steps": 6, "y": y, "clip": 1.0}
    guidance = {"guidance_scale": 3.0, "guided_channels": 1, "null_label": 5}
    actual = sample(diffusion, model, SHAPE, generator=seeded(), **options, **guidance)
    assert seen == [(6, [1, 2, 3, 5, 5, 5])] * calls
    torch.testing.assert_close(
        actual, sample(diffusion, guided, SHAPE, generator=seeded(), **options), rtol=1e-3, atol=1e-3
    )
    assert (actual - sample(diffusion, model, SHAPE, generator=seeded(), **options)).abs().max() > 0.1


def test_noise_comes_from_the_generator_alone():
    diffusion = Diffusion(learned_sigma=True)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(sample(diffusion, learned_wave, SHAPE, steps=5, generator=seeded(7)))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], sample(diffusion, learned_wave, SHAPE, steps=5, generator=seeded(8)))


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
@pytest.mark.parametrize(("level", "left"), [(1.0, 10), (0.5, 5), (0.01, 1)])
def test_image_to_image(prediction, level, left):
    diffusion, data = Diffusion(prediction=prediction), torch.randn(SHAPE)
    times, progress = [], []

    def model(x, t):
        times.append((x, t[0].item()))
        return wave(x, t)

    options = {"method": "ddim", "steps": 10, "start": (data, level)}
    sample(diffusion, model, SHAPE, generator=seeded(), report=lambda *args: progress.append(args[:2]), **options)
    assert progress == [(i + 1, left) for i in range(left)]
    noise = torch.randn(SHAPE, generator=seeded())
    t = torch.full(SHAPE[:1], times[0][1])
    torch.testing.assert_close(times[0][0], diffusion.noised(data, t, noise))
    whole = []
    sample(diffusion, lambda x, t: whole.append(t[0].item()) or wave(x, t), SHAPE, method="ddim", steps=10)
    assert [t for _, t in times] == whole[10 - left :]


@pytest.mark.parametrize(
    ("method", "prediction"), [("ddpm", "epsilon"), ("ddim", "v"), ("heun", "x0"), ("euler", "flow")]
)
def test_inpainting_keeps_what_is_known(method, prediction):
    diffusion, data = Diffusion(prediction=prediction), torch.randn(SHAPE[1:])
    mask = torch.zeros(SHAPE[2:], dtype=torch.bool)
    mask[:, :2] = True
    seen = []

    def model(x, t):
        seen.append((x[..., :2], t))
        return wave(x, t)

    options = {"method": method, "steps": 8, "known": (data, mask)}
    x = sample(diffusion, model, SHAPE, generator=seeded(), **options)
    assert torch.equal(x[..., :2], data.expand(SHAPE)[..., :2])
    assert (x[..., 2:] - data[..., 2:]).abs().max() > 0.1
    free = sample(diffusion, wave, SHAPE, generator=seeded(), **{**options, "known": None})
    assert not torch.equal(free[..., :2], x[..., :2])
    # At every step the model sees the known pixels noised as far as the rest; "heun" sees its own guesses between.
    generator = seeded()
    noise = torch.randn(SHAPE, generator=generator)
    seen = seen[::2] if method == "heun" else seen
    assert len(seen) == 8
    for i, (pixels, t) in enumerate(seen):
        if method == "ddpm" and i > 0:  # one draw for the step, one for what is known
            _, noise = (torch.randn(SHAPE, generator=generator) for _ in range(2))
        torch.testing.assert_close(pixels, diffusion.noised(data.expand(SHAPE), t, noise)[..., :2])
    assert torch.equal(
        sample(diffusion, wave, SHAPE, method=method, steps=8, known=(data, torch.ones_like(mask))), data.expand(SHAPE)
    )


def test_results_are_float32_for_any_data():
    data, mask = torch.randn(SHAPE, dtype=torch.float64), torch.ones(SHAPE[2:], dtype=torch.bool)
    for options in ({"start": (data, 0.5)}, {"known": (data, mask)}):
        assert sample(Diffusion(), wave, SHAPE, steps=2, **options).dtype == torch.float32


def test_reports_every_step():
    seen = []
    x = sample(Diffusion(), wave, SHAPE, steps=4, report=lambda done, total, x: seen.append((done, total, x)))
    assert [each[:2] for each in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(seen[-1][2], x)


def test_a_transformer_can_be_sampled():
    model = DiT(4, 2, 2, 32, 1, 2, num_classes=5).eval()
    x = sample(Diffusion(learned_sigma=True), model, SHAPE, steps=3, y=torch.tensor([0, 1, 4]), guidance_scale=2.0)
    assert x.shape == SHAPE
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("prediction", "options", "message"),
    [
        ("epsilon", {"method": "plms"}, "method: expected one of ddpm, ddim, euler, heun, got 'plms'"),
        ("flow", {"method": "ddpm"}, "method: expected ddim, euler or heun for a flow, got 'ddpm'"),
        ("flow", {"method": "euler", "steps": 0}, "steps: expected at least 1, got 0"),
        ("epsilon", {"steps": 1001}, "steps: expected from 1 to 1000, got 1001"),
        ("epsilon", {"guidance_scale": 2.0}, "guidance_scale: expected 1 without labels y, got 2.0"),
        ("epsilon", {"y": torch.zeros(2)}, "y: expected shape [3], got [2]"),
        ("epsilon", {"start": (torch.zeros(1), 0.0)}, "start: expected a level above 0 and at most 1, got 0.0"),
        (
            "epsilon",
            {"start": (torch.zeros(5, 1, 1), 1.0)},
            "start: expected a shape that expands to [3, 2, 4, 4], got [5, 1, 1]",
        ),
        (
            "epsilon",
            {"known": (torch.zeros(1), torch.ones(4, 3, dtype=torch.bool))},
            "known[1]: expected a shape that expands to [3, 2, 4, 4], got [4, 3]",
        ),
        ("epsilon", {"method": "ddim", "eta": 1.5}, "eta: expected a number from 0 to 1, got 1.5"),
        ("epsilon", {"method": "euler", "eta": 0.5}, "eta: expected 0 for euler, got 0.5"),
        (
            "epsilon",
            {"y": torch.zeros(3), "guidance_scale": 2.0},
            "null_label: expected an integer for a model without num_classes, got None",
        ),
    ],
)
def test_bad_arguments(prediction, options, message):
    with pytest.raises(ValueError, match="expected") as error:
        sample(Diffusion(prediction=prediction), wave, SHAPE, **options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": (torch.zeros(1, dtype=torch.uint8), 0.5)}, "^start: expected a tensor of float32"),
        ({"known": (torch.zeros(1), torch.ones(1))}, r"^known\[1\]: expected a tensor of bool, got float32"),
    ],
)
def test_bad_types(options, message):
    with pytest.raises(TypeError, match=message):
        sample(Diffusion(), wave, SHAPE, **options)
