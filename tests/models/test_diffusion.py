"""Noise levels, targets and losses: diffusers' schedulers, Bayes' rule and torch.distributions beside them."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.distributions import Normal, kl_divergence

from vqkernels.models import Diffusion

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
DIFFUSIONS = ("epsilon", "v", "x0")
PREDICTIONS = (*DIFFUSIONS, "flow")


def batch(count=6):
    return torch.randn(count, 3, 4, 4).clamp(-1, 1), torch.tensor([0, 1, 17, 500, 998, 999][:count])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [1000, 50])
def test_schedules_are_those_of_diffusers(schedule, timesteps):
    scale = 1000 / timesteps if schedule == "linear" else 1
    scheduler = DDPMScheduler(timesteps, 1e-4 * scale, 0.02 * scale, beta_schedule=SCHEDULES[schedule])
    expected = scheduler.alphas_cumprod.double()
    actual = Diffusion(timesteps, schedule).signal ** 2
    # diffusers' are products of factors 1 - beta, each product and each factor rounded to float32.
    roundings = (2**-24 * (1 + 2 / scheduler.alphas.double())).cumsum(0)
    assert ((actual - expected).abs() <= roundings * expected).all()


def test_linear_schedule_in_closed_form():
    product, signal = 1.0, Diffusion().signal
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        assert signal[t].item() == pytest.approx(math.sqrt(product), rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noised_and_velocity_are_those_of_diffusers(schedule):
    diffusion = Diffusion(schedule=schedule, prediction="v")
    scheduler = DDPMScheduler(beta_schedule=SCHEDULES[schedule])
    x0, t = batch()
    noise = torch.randn_like(x0)
    torch.testing.assert_close(diffusion.noised(x0, t, noise), scheduler.add_noise(x0, noise, t), rtol=0, atol=1e-4)
    torch.testing.assert_close(diffusion.target(x0, t, noise), scheduler.get_velocity(x0, noise, t), rtol=0, atol=1e-4)


def test_flow_is_a_straight_line():
    diffusion = Diffusion(timesteps=100, prediction="flow")
    x0, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    t = torch.tensor([0.0, 25.0, 100.0])
    x = diffusion.noised(x0, t, noise)
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[2], noise[2])
    torch.testing.assert_close(x[1], 0.75 * x0[1] + 0.25 * noise[1])
    assert torch.equal(diffusion.target(x0, t, noise), noise - x0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_leads_back_to_the_data(prediction):
    diffusion = Diffusion(prediction=prediction)
    x0, t = (value.double() for value in batch())
    t = t if diffusion.is_flow else t.long()
    noise = torch.randn_like(x0)
    x, target = diffusion.noised(x0, t, noise), diffusion.target(x0, t, noise)
    for i, (a, s) in enumerate(zip(*(v.tolist() for v in diffusion.levels(t)), strict=True)):
        k, m = diffusion.to_clean(a, s)
        torch.testing.assert_close(k * x[i] + m * target[i], x0[i], rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_is_that_of_bayes(schedule):
    """q(z | x, x0) is proportional to q(x | z) q(z | x0): precisions of normal distributions add up."""
    diffusion = Diffusion(schedule=schedule)
    for a, previous in (
        (0.5, 0.9),
        (0.01, 0.1),
        *[(diffusion.signal[t].item(), diffusion.signal[t - 1].item()) for t in (1, 500, 999)],
    ):
        ratio = a / previous
        of_step, of_prior = ratio**2 / (1 - ratio**2), 1 / (1 - previous**2)
        variance = 1 / (of_step + of_prior)
        from_x, from_clean = variance * ratio / (1 - ratio**2), variance * previous / (1 - previous**2)
        assert diffusion.posterior(a, previous) == pytest.approx((from_x, from_clean, variance), rel=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learned_variances_are_those_of_diffusers(schedule):
    diffusion = Diffusion(schedule=schedule)
    scheduler = DDPMScheduler(beta_schedule=SCHEDULES[schedule], variance_type="learned_range")
    ranges = diffusion.log_variances(diffusion.signal.tolist())
    assert len(ranges) == 1000
    for t in (2, 10, 500, 998):
        for fraction in (-1.0, 0.3, 1.0):
            low, high = ranges[t]
            expected = scheduler._get_variance(
                t, predicted_variance=torch.tensor(fraction), variance_type="learned_range"
            )
            assert low + (high - low) * (fraction + 1) / 2 == pytest.approx(expected.item(), abs=3e-3)
    assert ranges[0] == pytest.approx((ranges[1][0], math.log(1 - diffusion.signal[0].item() ** 2)))


def bound(diffusion, x0, t, noise, prediction, fraction):
    """The terms of the bound by torch.distributions, in float64."""
    a, s = (v.reshape(-1, 1, 1, 1) for v in diffusion.levels(t))
    x = a * x0 + s * noise
    clean = {"epsilon": (x - s * prediction) / a, "v": a * x - s * prediction, "x0": prediction}[diffusion.prediction]
    levels = [1.0, *diffusion.signal.tolist()]
    terms = []
    for i, step in enumerate(t.tolist()):
        k, m, variance = diffusion.posterior(levels[step + 1], levels[step])
        low, high = diffusion.log_variances(levels[1:])[step]
        scale = (0.5 * (low + (high - low) * (fraction[i] + 1) / 2)).exp()
        model = Normal(k * x[i] + m * clean[i], scale)
        if step == 0:
            values = ((x0[i] + 1) * 255 / 2).round().long()
            shares = (model.cdf(edges_of(values + 1)) - model.cdf(edges_of(values))).clamp(min=1e-12)
            terms.append(-shares.log().mean())
        else:
            terms.append(kl_divergence(Normal(k * x[i] + m * x0[i], math.sqrt(variance)), model).mean())
    return torch.stack(terms) / math.log(2)


def edges_of(values):
    """The lower edge of the interval of each of 256 values from -1 to 1."""
    edges = -1 + (2 * values.double() - 1) / 255
    return edges.masked_fill(values == 0, -math.inf).masked_fill(values == 256, math.inf)


@pytest.mark.parametrize("prediction", DIFFUSIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_variational_bound(schedule, prediction):
    diffusion = Diffusion(schedule=schedule, prediction=prediction, learned_sigma=True)
    x0, t = batch(4)
    x0 = ((x0 + 1) * 255 / 2).round() * 2 / 255 - 1
    noise, fraction = torch.randn_like(x0), torch.rand_like(x0) * 2 - 1
    output = diffusion.target(x0, t, noise) + 0.1 * torch.randn_like(x0)
    expected = bound(diffusion, *(v.double() if v.is_floating_point() else v for v in (x0, t, noise, output, fraction)))
    actual = diffusion.bound_terms(x0, diffusion.noised(x0, t, noise), t, output, fraction)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_extreme_pixels_take_the_tails():
    """At t = 0 the 256 values of a pixel share all of the probability."""
    diffusion = Diffusion(prediction="x0", learned_sigma=True)
    values = (torch.arange(256.0) * 2 / 255 - 1).reshape(-1, 1, 1, 1)
    t = torch.zeros(256, dtype=torch.int64)
    for mean in (-1.0, 0.997, 0.3):
        guess, x = torch.full_like(values, mean), torch.zeros_like(values)
        bits = diffusion.bound_terms(values, x, t, guess, torch.ones_like(values))
        assert (2.0 ** -bits.double()).sum().item() == pytest.approx(1, abs=1e-5)


def test_loss_is_that_of_the_target():
    x0, t = batch()
    noise = torch.randn_like(x0)
    for prediction in PREDICTIONS:
        diffusion = Diffusion(prediction=prediction)
        times = t.float() if diffusion.is_flow else t
        target = diffusion.target(x0, times, noise)
        seen = []

        def model(x, t, y, target=target, seen=seen):
            seen.append((x, t, y))
            return target + 0.5

        losses = diffusion.losses(model, x0, times, torch.arange(6), noise=noise)
        torch.testing.assert_close(losses, torch.full((6,), 0.25))
        assert diffusion.loss(model, x0, times, torch.arange(6), noise=noise).item() == pytest.approx(0.25)
        assert torch.equal(seen[0][0], diffusion.noised(x0, times, noise))
        assert torch.equal(seen[0][1], times)
        assert diffusion.loss(lambda x, t, target=target: target, x0, times, noise=noise) == 0


def test_bound_teaches_the_variance_alone():
    diffusion = Diffusion(timesteps=100, learned_sigma=True)
    x0, t = batch(3)
    noise = torch.randn_like(x0)
    outputs = [torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    for output, weight in zip(outputs, (0.0, 1e-3), strict=True):
        diffusion.loss(lambda x, t, output=output: output, x0, t, noise=noise, vlb_weight=weight).backward()
    assert torch.equal(outputs[0].grad[:, :3], outputs[1].grad[:, :3])
    assert not outputs[0].grad[:, 3:].any()
    assert outputs[1].grad[:, 3:].all()
    # The bound is a sum of 100 terms, of which one stands for all.
    losses = [diffusion.losses(lambda x, t: outputs[0], x0, t, noise=noise, vlb_weight=w) for w in (0.0, 1e-3)]
    terms = diffusion.bound_terms(x0, diffusion.noised(x0, t, noise), t, outputs[0][:, :3], outputs[0][:, 3:])
    torch.testing.assert_close(losses[1] - losses[0], 0.1 * terms, rtol=1e-3, atol=1e-5)


def test_random_times():
    generator = torch.Generator().manual_seed(0)
    t = Diffusion(timesteps=10).random_times(5000, generator=generator)
    assert t.dtype == torch.int64
    assert t.bincount().tolist() == pytest.approx([500] * 10, abs=5 * math.sqrt(500))
    t = Diffusion(timesteps=10, prediction="flow").random_times(5000, generator=generator)
    assert t.dtype == torch.float32
    assert 0 <= t.min() < 0.05
    assert 9.95 < t.max() <= 10
    assert t.mean().item() == pytest.approx(5, abs=5 * 10 / math.sqrt(12 * 5000))


def test_respaced():
    diffusion = Diffusion()
    assert diffusion.respaced(1000) == list(range(1000))
    assert diffusion.respaced(1) == [999]
    steps = diffusion.respaced(250)
    assert (len(steps), steps[0], steps[-1]) == (250, 0, 999)
    assert all(abs(t - i * 999 / 249) <= 0.5 for i, t in enumerate(steps))
    assert len(set(steps)) == 250


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "sigmoid"}, "schedule: expected one of linear, cosine, got 'sigmoid'"),
        ({"prediction": "noise"}, "prediction: expected one of epsilon, v, x0, flow, got 'noise'"),
        ({"timesteps": 0}, "timesteps: expected at least 1, got 0"),
        ({"prediction": "flow", "learned_sigma": True}, "learned_sigma: expected False for a flow, got True"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match="expected") as error:
        Diffusion(**options)
    assert str(error.value) == message


def test_bad_calls():
    x0, t = batch()
    with pytest.raises(ValueError, match=r"model: expected an output of shape \[6, 6, 4, 4\], got \[6, 3, 4, 4\]"):
        Diffusion(learned_sigma=True).loss(lambda x, t: x, x0, t)
    with pytest.raises(ValueError, match=r"model: expected an output of shape \[6, 3, 4, 4\], got \[6, 3, 1, 4\]"):
        Diffusion().loss(lambda x, t: x[:, :, :1], x0, t)
    with pytest.raises(ValueError, match=r"noise: expected shape \[6, 3, 4, 4\], got \[3, 4, 4\]"):
        Diffusion().loss(lambda x, t: x, x0, t, noise=x0[0])
    with pytest.raises(ValueError, match=r"t: expected shape \[6\], got \[\]"):
        Diffusion().loss(lambda x, t: x, x0, t[0])
    for t in (-1, 10):
        with pytest.raises(IndexError, match=f"t: expected timesteps from 0 to 9, got {t}"):
            Diffusion(timesteps=10).noised(x0[:1], torch.tensor([t]), x0[:1])
    with pytest.raises(ValueError, match="steps: expected from 1 to 10, got 11"):
        Diffusion(timesteps=10).respaced(11)
    with pytest.raises(ValueError, match="a flow has no timesteps"):
        Diffusion(prediction="flow").respaced(3)


def test_ddim_scheduler_agrees_on_the_clean_sample():
    x0, _ = batch()
    noise = torch.randn_like(x0)
    for prediction, theirs in (("epsilon", "epsilon"), ("v", "v_prediction"), ("x0", "sample")):
        scheduler = DDIMScheduler(beta_schedule="linear", prediction_type=theirs, clip_sample=False)
        scheduler.set_timesteps(1000)
        diffusion = Diffusion(prediction=prediction)
        a, s = (v.item() for v in diffusion.levels(torch.tensor(300)))
        x, output = a * x0 + s * noise, torch.randn_like(x0)
        k, m = diffusion.to_clean(a, s)
        expected = scheduler.step(output, 300, x).pred_original_sample
        torch.testing.assert_close(k * x + m * output, expected, rtol=1e-4, atol=1e-4)
