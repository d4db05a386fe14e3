"""A run that was stopped and resumed is the run that was not, bit for bit; and the loop is that of plain PyTorch."""

import os
import re
import signal

import pytest
import torch
from torch import nn

from vqkernels import fuse
from vqkernels.models import VQVAE, Diffusion, DiT
from vqkernels.training.dit import DiTTraining
from vqkernels.training.loop import fit, seed_step
from vqkernels.training.sampling import DiTSampler
from vqkernels.training.spaces import Latents, Pixels

CPU = torch.device("cpu")


def train(path, config, data, steps, resume=False, kind=DiTTraining, space=None):
    """Trains to `steps` steps in all, with torch's generator in a state that no run may depend on."""
    torch.manual_seed(int.from_bytes(os.urandom(4)))
    module = kind(config, space or Pixels(), data)
    torch.manual_seed(int.from_bytes(os.urandom(4)))
    return fit(module, path, steps=steps, save_every=100, device=CPU, resume=resume)


def assert_same_run(first, second):
    """Weights, averages, optimizer, schedule, step; then samples."""
    first_content, second_content = (torch.load(path, weights_only=True) for path in (first, second))
    assert first_content["global_step"] == second_content["global_step"]
    assert first_content["lr_schedulers"] == second_content["lr_schedulers"]
    for key in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(first_content[key], second_content[key], rtol=0, atol=0)
    labels = torch.arange(10)
    images = [DiTSampler.load(path).draw(labels, steps=3) for path in (first, second)]
    assert torch.equal(*images)


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


class Signalled(DiTTraining):
    """Gets a signal in the middle of the third step."""

    number = signal.SIGTERM

    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            os.kill(os.getpid(), self.number)
        return super().training_step(batch, batch_idx)


class Interrupted(Signalled):
    number = signal.SIGINT


@pytest.mark.parametrize(
    "options",
    [{}, {"reference": True}, {"prediction": "epsilon", "learned_sigma": True, "patch_size": 4}],
    ids=["fused", "reference", "learned sigma"],
)
def test_resumed_runs_are_those_that_were_not_stopped(tmp_path, tiny, few_digits, options):
    config = tiny(**options)
    whole, parts = tmp_path / "whole.ckpt", tmp_path / "parts.ckpt"
    assert train(whole, config, few_digits, 6) is None
    assert train(parts, config, few_digits, 3) is None
    halfway = weights(parts)
    assert train(parts, config, few_digits, 6, resume=True) is None
    assert_same_run(whole, parts)
    assert not torch.equal(halfway["model.x_embedder.proj.weight"], weights(parts)["model.x_embedder.proj.weight"])
    assert {path.name for path in tmp_path.iterdir()} == {"whole.ckpt", "parts.ckpt"}

    other = tmp_path / "other.ckpt"
    train(other, tiny(**options, seed=1), few_digits, 6)
    assert not torch.equal(
        weights(other)["model.x_embedder.proj.weight"], weights(whole)["model.x_embedder.proj.weight"]
    )


@pytest.mark.parametrize("kind", [Signalled, Interrupted])
def test_a_signal_stops_after_the_step_and_the_run_can_go_on(tmp_path, tiny, few_digits, kind):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    whole, parts = tmp_path / "whole.ckpt", tmp_path / "parts.ckpt"
    train(whole, tiny(), few_digits, 6)
    assert train(parts, tiny(), few_digits, 6, kind=kind) == kind.number
    assert torch.load(parts, weights_only=True)["global_step"] == 3
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert train(parts, tiny(), few_digits, 6, resume=True) is None
    assert_same_run(whole, parts)


class InterruptedAtTheStart(DiTTraining):
    """Gets SIGINT when Lightning is at work and has not begun to train."""

    def configure_optimizers(self):
        os.kill(os.getpid(), signal.SIGINT)
        return super().configure_optimizers()


@pytest.mark.parametrize("resume", [False, True])
def test_an_interrupt_before_the_first_step_is_no_exit(tmp_path, tiny, few_digits, resume):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    path = tmp_path / "run.ckpt"
    if resume:
        train(path, tiny(), few_digits, 2)
    before = path.read_bytes() if resume else None
    with pytest.raises(KeyboardInterrupt):
        train(path, tiny(), few_digits, 6, resume=resume, kind=InterruptedAtTheStart)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (path.read_bytes() if path.exists() else None) == before


def test_other_exits_are_kept(tmp_path, tiny, few_digits):
    class Exits(DiTTraining):
        def configure_optimizers(self):
            raise SystemExit(7)

    with pytest.raises(SystemExit) as raised:
        train(tmp_path / "run.ckpt", tiny(), few_digits, 2, kind=Exits)
    assert raised.value.code == 7


def test_latents_resume_and_are_saved_with_the_run(tmp_path, tiny, few_digits):
    vqvae = VQVAE(1, 16, residual_channels=8, downsamplings=1, codebook_size=16, codebook_dim=8)
    space = Latents.of(vqvae, few_digits.images)
    whole, parts = tmp_path / "whole.ckpt", tmp_path / "parts.ckpt"
    train(whole, tiny(), few_digits, 6, space=space)
    train(parts, tiny(), few_digits, 3, space=space)
    train(parts, tiny(), few_digits, 6, resume=True, space=space)
    assert_same_run(whole, parts)
    loaded = DiTSampler.load(whole).space
    x = space.encode(few_digits.images)
    assert torch.equal(loaded.encode(few_digits.images), x)
    assert torch.equal(loaded.decode(x), vqvae.eval().reconstruct(few_digits.images).clamp(0, 1))
    assert loaded.shape == (8, 4, 4)


def test_the_run_is_a_plain_loop(tmp_path, tiny, few_digits):
    """Written out: AdamW, warm-up, clipped gradients, average of the weights, random numbers of the step."""
    config = tiny(reference=True)
    train(tmp_path / "run.ckpt", config, few_digits, 5)
    content = torch.load(tmp_path / "run.ckpt", weights_only=True)

    seed_step(config.seed, -1)
    model = DiT(8, 2, 1, 16, 2, 2, class_dropout_prob=0.3, num_classes=10, learn_sigma=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    average = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    diffusion = Diffusion(prediction="flow")
    for step in range(5):
        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1, (step + 1) / 4)
        torch.manual_seed(step)  # the run's seed is 0
        chosen = torch.randint(40, (8,))
        t = torch.rand(8) * 1000
        noise = torch.randn(8, 1, 8, 8)
        loss = diffusion.loss(model, few_digits.images[chosen] * 2 - 1, t, few_digits.labels[chosen], noise=noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = 0.0 if step == 0 else min(0.9, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, parameter in zip(average, model.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
    for mean, (name, parameter) in zip(average, model.named_parameters(), strict=True):
        torch.testing.assert_close(content["state_dict"][f"model.{name}"], parameter.detach())
        torch.testing.assert_close(content["state_dict"][f"average.module.{name}"], mean.detach())


def test_steps_have_seeds_of_their_own():
    def draws(seed, step):
        seed_step(seed, step)
        return tuple(torch.randint(2**31, (4,)).tolist())

    pairs = [(seed, step) for seed in (0, 1, 2, 2**31 - 1) for step in (-1, 0, 1, 2, 100_000)]
    assert len({draws(*pair) for pair in pairs}) == len(pairs)
    assert draws(1, 2) == draws(1, 2)


def test_what_is_not_finite_is_not_saved(tmp_path, tiny, few_digits):
    path = tmp_path / "run.ckpt"
    train(path, tiny(), few_digits, 2)
    before = path.read_bytes()
    broken = few_digits._replace(images=few_digits.images * torch.nan)
    kept = re.escape(f"{path} is still that of step 2")
    with pytest.raises(FloatingPointError, match=f"^the loss of step 4 is nan; {kept}$"):
        train(path, tiny(), broken, 4, resume=True)
    assert path.read_bytes() == before


class Broken(DiTTraining):
    """A weight is infinite after the last step, whose loss was finite."""

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.global_step == 3:  # counted afterwards
            self.model.x_embedder.proj.bias.data[0] = torch.inf


def test_weights_that_are_not_finite_are_not_saved(tmp_path, tiny, few_digits):
    path = tmp_path / "run.ckpt"
    broken = "the weights after step 4 are not finite, of model.x_embedder.proj.bias at least"
    with pytest.raises(FloatingPointError, match=f"^{broken}; nothing was saved$"):
        train(path, tiny(), few_digits, 4, kind=Broken)
    assert not path.exists()
    train(path, tiny(), few_digits, 2)
    before = path.read_bytes()
    with pytest.raises(FloatingPointError, match=f"^{broken}; {re.escape(str(path))} is still that of step 2$"):
        train(path, tiny(), few_digits, 4, kind=Broken, resume=True)
    assert path.read_bytes() == before


def test_global_settings_are_restored(tmp_path, tiny, few_digits):
    torch.use_deterministic_algorithms(False)
    train(tmp_path / "run.ckpt", tiny(), few_digits, 1)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("reference", [False, True])
def test_models_are_fused_unless_the_reference_is_asked_for(tmp_path, tiny, few_digits, reference):
    module = DiTTraining(tiny(reference=reference), Pixels(), few_digits)
    fit(module, tmp_path / "run.ckpt", steps=1, save_every=1, device=CPU, resume=False)
    drawing = DiTSampler.load(tmp_path / "run.ckpt").model
    for model in (module.model, module.averaged_model, drawing):
        report = fuse(model, verbose=False)  # of what is fused already it says so
        assert bool(report.fused) is reference
        assert {"blocks.0", "blocks.1"} <= {part.name for part in (report.fused if reference else report.left)}
