"""Models in files: the arguments and the state_dict, read without running code of the file."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from vqkernels import nn
from vqkernels.models.vqvae import VQVAE

FORMAT = "vqkernels.models.VQVAE"

# What torch raises for a file that is no checkpoint, and the model for one of another model.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def save_checkpoint(model: VQVAE, path: str | os.PathLike[str]) -> None:
    """Writes a model to a file, which appears when it is complete."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.tmp")
    torch.save({"format": FORMAT, "config": model.config, "state_dict": model.state_dict()}, unfinished)
    os.replace(unfinished, path)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    quantizer: type[nn.VectorQuantize] = nn.VectorQuantize,
) -> VQVAE:
    """The model of a file that `save_checkpoint` has written, in evaluation mode.

    Args:
        path: of the file.
        device: for the model.
        quantizer: class of its quantizer.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it holds something else.
        RuntimeError, AssertionError: torch cannot use the device.
    """
    expected = f"a checkpoint of {FORMAT}"
    content = read_content(path, expected)
    try:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError("it has no such record")
        model = VQVAE(**content["config"], quantizer=quantizer)
        model.load_state_dict(content["state_dict"])
    except UNREADABLE as error:
        raise ValueError(f"{path}: expected {expected}, got something else: {in_words(error)}") from error
    return model.to(device).eval()


def read_content(path: str | os.PathLike[str], expected: str) -> Any:
    """What `torch.save` has put into a file, on the CPU, read without running code of the file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is another file than `expected` says.
    """
    file = io.BytesIO(Path(path).read_bytes())
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # bytes that are no checkpoint lead torch's unpickler to almost any of them
        got = "a file that torch.load(weights_only=True) cannot read"
        raise ValueError(f"{path}: expected {expected}, got {got}") from error


def in_words(error: Exception) -> str:
    """What an exception of UNREADABLE says of the content of a file."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
