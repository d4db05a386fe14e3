"""What the parsers of several commands share."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vqkernels.models.samplers import METHODS

THREADS = "CPU threads; 0: torch's choice"
DEVICE = "cpu, cuda or cuda:N; auto: cuda where there is one"


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of arguments: integers from `least` to `most`."""
    expected = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def number(least: float, most: float | None = None) -> Callable[[str], float]:
    """A type of arguments: finite numbers from `least` to `most`."""
    expected = f"a number of at least {least:g}" if most is None else f"a number from {least:g} to {most:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def add_config(parser: argparse.ArgumentParser, config: type) -> None:
    """Adds an option for every field of a configuration; those not given are not set, as `given` expects."""
    for field in dataclasses.fields(config):
        kwargs: dict[str, Any] = {"default": argparse.SUPPRESS}
        limits = field.metadata
        text = limits["help"] if field.type is bool else f"{limits['help']} (default: {field.default})"
        if field.type is bool:
            kwargs["action"] = "store_true"
        elif "choices" in limits:
            kwargs["choices"] = limits["choices"]
        else:
            kind = integer if field.type is int else number
            kwargs |= {"type": kind(limits["least"], limits.get("most")), "metavar": "N" if field.type is int else "X"}
        parser.add_argument("--" + field.name.replace("_", "-"), help=text, **kwargs)


def given(arguments: argparse.Namespace, config: type) -> dict[str, Any]:
    """The fields of a configuration that the user has set."""
    values = vars(arguments)
    return {field.name: values[field.name] for field in dataclasses.fields(config) if field.name in values}


def add_sampling(parser: argparse.ArgumentParser, steps: str) -> None:
    """Adds the options of drawing samples; `steps` is the name of the option of the number of steps."""
    parser.add_argument(
        "--method", choices=METHODS, help="of sampling; ddpm not for a flow (default: heun for a flow, else ddim)"
    )
    parser.add_argument(steps, type=integer(1), default=20, metavar="N", help="steps of sampling (default: 20)")
    parser.add_argument(
        "--guidance",
        type=number(0.0),
        default=1.5,
        metavar="X",
        help="scale of classifier-free guidance, 1 for none (default: 1.5)",
    )


@contextmanager
def progress_bar(label: str, steps: int) -> Iterator[Callable[[int, int, Any], None]]:
    """A progress bar of rich; gives a function that samplers can report to."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=steps)
        yield lambda done, total, _: progress.update(task, completed=done, total=total)
