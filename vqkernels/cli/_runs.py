"""What the training commands of all models share: their options, what is resumed, what is printed at the start."""

import argparse
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from vqkernels.cli import _arguments
from vqkernels.cli.demo import writable_folder
from vqkernels.training.checkpoint import NAME, read_checkpoint
from vqkernels.training.config import TrainingConfig

CHANGEABLE = ("steps", "threads")  # of a run that is resumed

Config = TypeVar("Config", bound=TrainingConfig)


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Adds the options of a run that do not change what is trained."""
    parser.add_argument(
        "--data", choices=["digits"], default="digits", help="scikit-learn's 1,797 digits of 8x8 pixels"
    )
    parser.add_argument("--out", default=out, help=f"folder for checkpoint and results (default: {out})")
    parser.add_argument("--resume", action="store_true", help="go on with the checkpoint in the folder")
    parser.add_argument("--device", default="auto", help=_arguments.DEVICE)
    parser.add_argument(
        "--save-every",
        type=_arguments.integer(1),
        default=250,
        metavar="N",
        help="steps between checkpoints (default: 250)",
    )


@contextmanager
def folder_of_run(name: str) -> Iterator[Path]:
    """The folder of that name, made where it is missing; it goes again if nothing has been written to it.

    SIGTERM ends the command in between, as SIGINT does, until training has a handler that saves first.
    """
    # Without "..", which would be looked for in folders that are missing; links lead where they lead.
    folder = Path(os.path.realpath(name))
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, leave) if is_main else None
    try:
        yield writable_folder(str(folder))
    finally:
        for path in missing:
            with suppress(OSError):  # it is not empty, or has not been made
                path.rmdir()
        if is_main:
            signal.signal(signal.SIGTERM, before)


def begin(
    arguments: argparse.Namespace, folder: Path, model: str, kind: type[Config]
) -> tuple[dict[str, Any] | None, Config]:
    """The checkpoint to go on with, if there is one, and the configuration; sets the number of threads.

    Raises:
        SystemExit: there is a run in the folder that shall not be resumed, none that can be, or another one.
    """
    path, values = folder / NAME, _arguments.given(arguments, kind)
    if not arguments.resume:
        if path.exists():
            raise SystemExit(
                f"--out {str(folder)!r} holds a run: --resume goes on with it; a new one needs a new folder"
            )
        content, config = None, kind(**values)
    else:
        try:
            content, saved = read_checkpoint(path, model, kind)
        except FileNotFoundError as error:
            raise SystemExit(
                f"--resume: {str(path)!r}: {error.strerror}; a run that ended before its first checkpoint has none, "
                "start it again without --resume"
            ) from None
        except OSError as error:
            raise SystemExit(f"--resume: {str(path)!r}: {error.strerror or error}") from None
        except ValueError as error:
            raise SystemExit(f"--resume: {error}") from None
        for name, value in values.items():
            before = getattr(saved, name)
            if value != before and name not in CHANGEABLE:
                option = name.replace("_", "-")
                raise SystemExit(f"--resume keeps --{option} as it was: expected {before} or nothing, got {value}")
        config = dataclasses.replace(saved, **values)
        if config.steps < content["global_step"]:
            done = content["global_step"]
            raise SystemExit(f"--steps: expected at least the {done} that the run has done, got {config.steps}")
    if config.threads:
        torch.set_num_threads(config.threads)
    return content, dataclasses.replace(config, threads=torch.get_num_threads())


def describe(model: str, config: TrainingConfig, **more: str) -> None:
    """Prints what is trained."""
    values = more | {key: str(value) for key, value in dataclasses.asdict(config).items()}
    print(f"train {model}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
