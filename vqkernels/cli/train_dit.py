"""`python -m vqkernels train dit`: a diffusion transformer that draws handwritten digits, and how well it does."""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vqkernels.cli import _arguments, _runs
from vqkernels.cli.demo import choose_device, provenance, require
from vqkernels.models import load_checkpoint
from vqkernels.models.checkpoint import UNREADABLE
from vqkernels.training.checkpoint import FORMAT, NAME, refusal
from vqkernels.training.config import DiTConfig

if TYPE_CHECKING:
    from vqkernels.training.data import Labelled
    from vqkernels.training.sampling import DiTSampler
    from vqkernels.training.spaces import Space

METRICS, PICTURE = "metrics.json", "samples.png"
SHOWN = 8  # samples of a class


def add_parser(models: Any) -> None:
    """Adds `dit` to the models of `train`."""
    parser = models.add_parser(
        "dit",
        help="a diffusion transformer that draws handwritten digits by class",
        description="Trains a class-conditional diffusion transformer on handwritten digits, draws samples with the "
        "moving average of its weights, and lets a classifier that was trained on the real digits read them. Ctrl-C or "
        "SIGTERM writes a checkpoint and stops; --resume goes on, to the result of a run that was never stopped. With "
        "--resume a finished run draws and measures again.",
    )
    parser.set_defaults(run=run)
    _runs.add_options(parser, out="dit")
    parser.add_argument("--latents", metavar="FILE", help="work on the latents of this VQ-VAE, as the demo's model.pt")
    _arguments.add_sampling(parser, "--sampling-steps")
    _arguments.add_config(parser.add_argument_group("model and training, kept by a resumed run"), DiTConfig)


def run(arguments: argparse.Namespace) -> int:
    """Trains, draws and measures; writes checkpoint.ckpt, samples.png and metrics.json.

    Returns:
        0, or 128 plus the number of the signal that has stopped training.

    Raises:
        argparse.ArgumentError: an argument cannot be used.
        SystemExit: a package or a file is missing, or the run cannot go on; the message says so.
    """
    require("lightning", "matplotlib", "rich", "sklearn", command="train command", extra="train")
    device = choose_device(arguments.device)
    with _runs.folder_of_run(arguments.out) as folder:
        return _run(arguments, device, folder)


def _run(arguments: argparse.Namespace, device: torch.device, folder: Path) -> int:
    from vqkernels.training.data import digits
    from vqkernels.training.dit import DiTTraining
    from vqkernels.training.loop import fit
    from vqkernels.training.sampling import DiTSampler

    if arguments.resume and arguments.latents:
        raise argparse.ArgumentError(None, "argument --latents: the checkpoint to resume has its own")
    content, config = _runs.begin(arguments, folder, "dit", DiTConfig)
    training, held_out = digits()
    steps_before = content["global_step"] if content else 0
    try:
        space = _saved_space(folder / NAME, content) if content else _new_space(arguments.latents, training)
        module = DiTTraining(config, space, training)
        _runs.describe("dit", config, data=arguments.data, space=type(space).__name__.lower(), device=str(device))
        # One image, so that what cannot be drawn is said before training and not after it.
        untrained = DiTSampler(config, module.averaged_model, space)
        try:
            untrained.draw(training.labels[:1], **_sampling(arguments, untrained))
        except ValueError as error:
            raise ValueError(f"sampling: {error}") from None
        start = time.perf_counter()
        if steps_before < config.steps:
            stopped_by = fit(
                module,
                folder / NAME,
                steps=config.steps,
                save_every=arguments.save_every,
                device=device,
                resume=content is not None,
            )
            if stopped_by:
                print(f"stopped; {folder / NAME} is written, and the same command with --resume goes on")
                return 128 + stopped_by
        trained = {"steps": config.steps - steps_before, "seconds": time.perf_counter() - start}
        _evaluate(arguments, folder, config, trained, training, held_out, device)
    except (FloatingPointError, OSError, ValueError) as error:
        raise SystemExit(f"train dit: {error}") from None
    return 0


def _saved_space(path: Path, content: dict[str, Any]) -> "Space":
    from vqkernels.training.spaces import load_space

    try:
        return load_space(content[FORMAT]["space"])
    except UNREADABLE as error:
        raise SystemExit(f"--resume: {refusal(path, 'dit', error)}") from None


def _new_space(latents: str | None, training: "Labelled") -> "Space":
    from vqkernels.training.spaces import Latents, Pixels

    if latents is None:
        return Pixels()
    try:
        return Latents.of(load_checkpoint(latents), training.images)
    except OSError as error:
        raise SystemExit(f"--latents {latents!r}: {error.strerror or error}") from None
    except ValueError as error:
        raise SystemExit(f"--latents: {error}") from None


def _sampling(arguments: argparse.Namespace, sampler: "DiTSampler") -> dict[str, Any]:
    return {
        "method": arguments.method or sampler.default_method,
        "steps": arguments.sampling_steps,
        "guidance": arguments.guidance,
        "seed": sampler.config.seed,
    }


def _evaluate(
    arguments: argparse.Namespace,
    folder: Path,
    config: DiTConfig,
    trained: dict[str, float],
    training: "Labelled",
    held_out: "Labelled",
    device: torch.device,
) -> None:
    """Draws as many samples of each class as digits are held out, with the checkpoint; writes picture and figures."""
    from vqkernels.cli._grid import draw_grid
    from vqkernels.training.classifier import train_classifier
    from vqkernels.training.data import CLASSES, Labelled, one_of_each
    from vqkernels.training.metrics import FRECHET, quality
    from vqkernels.training.sampling import DiTSampler

    start = time.perf_counter()
    sampler = DiTSampler.load(folder / NAME, device=device)
    sampling = _sampling(arguments, sampler)
    with _arguments.progress_bar("drawing samples", arguments.sampling_steps) as report:
        images = sampler.draw(held_out.labels, **sampling, report=report).cpu()
    samples = Labelled(images, held_out.labels)
    figures = quality(train_classifier(training), samples, training, held_out)
    metrics = {
        "provenance": provenance(device),
        "config": dataclasses.asdict(config) | {"space": sampler.space.state()["kind"]},
        "digits": {"training": len(training.images), "held_out": len(held_out.images)},
        "trained_by_this_command": trained,
        "sampling": sampling | {"seconds": time.perf_counter() - start},
        "quality": figures,
    }
    (folder / METRICS).write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    by_class = [images[held_out.labels == label][:SHOWN] for label in range(CLASSES)]
    rows = [("" if i else "drawn", torch.stack([of_class[i] for of_class in by_class])) for i in range(SHOWN)]
    distances = figures[FRECHET]
    lines = (
        f"Read as the class they were drawn for: {figures['accuracy_of_samples']:.1%} of {len(images)} samples, "
        f"{figures['accuracy_of_held_out_digits']:.1%} of {len(held_out.images)} real digits held out.",
        f"{FRECHET}, to those trained on: samples {distances['samples_to_training_digits']:.1f}, "
        f"real digits held out {distances['held_out_to_training_digits']:.1f}.",
        f"{config.steps} steps of training; {sampling['method']}, {sampling['steps']} steps, guidance "
        f"{sampling['guidance']:g}.",
    )
    title = "Digits by a diffusion transformer"
    draw_grid(folder / PICTURE, [("real", one_of_each(held_out)), *rows], list("0123456789"), title=title, lines=lines)
    print("\n".join(lines))
    print(f"training took {trained['seconds']:.0f} s, samples and figures {time.perf_counter() - start:.0f} s")
    print(f"{', '.join(str(folder / name) for name in (PICTURE, METRICS, NAME))} written")
