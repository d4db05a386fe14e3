"""Checkpoints of training runs: Lightning's, with the configuration and what sampling needs beside it."""

import dataclasses
import os
from typing import Any, TypeVar

from vqkernels.models.checkpoint import UNREADABLE, in_words, read_content
from vqkernels.training.config import TrainingConfig

FORMAT = "vqkernels.training"
NAME = "checkpoint.ckpt"

Config = TypeVar("Config", bound=TrainingConfig)


def record(model: str, config: TrainingConfig, **content: Any) -> dict[str, Any]:
    """What a Lightning module adds to its checkpoint: `on_save_checkpoint` puts it under the key of FORMAT."""
    return {"model": model, "config": dataclasses.asdict(config), **content}


def read_checkpoint(path: str | os.PathLike[str], model: str, config: type[Config]) -> tuple[dict[str, Any], Config]:
    """The content of a checkpoint of a run of this model, read without running code of the file, and its configuration.

    Args:
        path: of the file.
        model: the name that `record` was given.
        config: class of the configuration.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it holds something else.
    """
    content = read_content(path, _expected(model))
    try:
        if not isinstance(content, dict) or not isinstance(content.get(FORMAT), dict):
            raise ValueError("it has no such record")
        if content[FORMAT]["model"] != model:
            raise ValueError(f"it is one of {content[FORMAT]['model']!r}")
        if not isinstance(content["global_step"], int) or not isinstance(content["state_dict"], dict):
            raise ValueError("it is incomplete")
        return content, config(**content[FORMAT]["config"])
    except UNREADABLE as error:
        raise ValueError(refusal(path, model, error)) from error


def refusal(path: str | os.PathLike[str], model: str, error: Exception) -> str:
    """What to say of a file that is no checkpoint of the model."""
    return f"{path}: expected {_expected(model)}, got something else: {in_words(error)}"


def _expected(model: str) -> str:
    return f"a checkpoint of a training run of {model!r}"
