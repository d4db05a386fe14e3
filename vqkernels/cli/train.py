"""`python -m vqkernels train MODEL`: a parser for each model that can be trained."""

from typing import Any

from vqkernels.cli import train_dit


def add_parser(commands: Any) -> None:
    """Adds `train` and its models."""
    command = commands.add_parser("train", help="train a model; a run can be stopped and resumed")
    models = command.add_subparsers(title="models", required=True, metavar="MODEL")
    train_dit.add_parser(models)
