"""Reads images and audio as tensors; needs numpy, and Pillow for images."""

import importlib
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
AUDIO_SUFFIXES = frozenset({".npy", ".npz", ".wav"})
SOUNDFILE_SUFFIXES = frozenset({".aiff", ".flac", ".mp3", ".ogg", ".wav"})
IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def suffixes(dimensions: int) -> frozenset[str]:
    """What can be read for a model of images (2) or audio (1)."""
    if dimensions == 2:
        return IMAGE_SUFFIXES
    return AUDIO_SUFFIXES | SOUNDFILE_SUFFIXES if _soundfile() else AUDIO_SUFFIXES


def read(path: Path, dimensions: int, channels: int) -> Tensor:
    """An image [C, H, W] with values from 0 to 1, or audio [C, T] with values mostly from -1 to 1, as float32.

    Args:
        path: of a file with one of the `suffixes`.
        dimensions: 2 for an image, 1 for audio.
        channels: C. Images are converted; mono audio may stand for several channels, and several are averaged to one.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds nothing that fits.
    """
    values = _read_image(path, channels) if dimensions == 2 else _read_audio(path, channels)
    if 0 in values.shape:
        raise ValueError(f"expected at least one value, got shape {list(values.shape)}")
    if not values.isfinite().all():
        raise ValueError("expected finite values, got NaN or Inf")
    return values


def _read_image(path: Path, channels: int) -> Tensor:
    from PIL import Image

    if channels not in IMAGE_MODES:
        raise ValueError(f"expected a model of 1, 3 or 4 channels for images, got {channels}")
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert(IMAGE_MODES[channels]), dtype=np.float32) / 255
    except (SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises besides OSError and ValueError
        raise ValueError(str(error)) from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).movedim(-1, 0).contiguous()


def _read_audio(path: Path, channels: int) -> Tensor:
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        samples = _read_array(path)
    elif suffix == ".wav" and not _soundfile():
        samples = _read_wav(path)
    else:
        samples = _soundfile().read(path, dtype="float32", always_2d=True)[0].T
    if samples.ndim == 1:
        samples = samples[None]
    if samples.ndim != 2:
        raise ValueError(f"expected an array of shape [T] or [C, T], got {list(samples.shape)}")
    audio = torch.from_numpy(np.ascontiguousarray(_to_float(samples)))
    if len(audio) == channels:
        return audio
    if channels == 1:
        return audio.mean(0, keepdim=True)
    if len(audio) == 1:
        return audio.expand(channels, -1).contiguous()
    raise ValueError(f"expected 1 or {channels} channels, got {len(audio)}")


def _read_array(path: Path) -> Any:
    content = np.load(path, allow_pickle=False)
    if isinstance(content, np.ndarray):
        return content
    with content:
        if len(content.files) != 1:
            raise ValueError(f"expected one array, got {content.files}")
        return content[content.files[0]]


def _read_wav(path: Path) -> Any:
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, count = file.getsampwidth(), file.getnchannels(), file.getnframes()
            data = file.readframes(count)
    except (wave.Error, EOFError) as error:
        raise ValueError(str(error) or "the file ends early") from error
    if len(data) != width * channels * count:
        raise ValueError(f"expected {count} frames, got {len(data) / (width * channels):g}")
    # Samples of 8 bits have no sign; all others are brought to 32 bits, with zeros below.
    octets = np.frombuffer(data, np.uint8).reshape(-1, width)
    wide = np.zeros((len(octets), 4), np.uint8)
    wide[:, 4 - width :] = octets ^ 0x80 if width == 1 else octets
    return wide.view("<i4").reshape(-1, channels).T


def _to_float(samples: Any) -> Any:
    if np.issubdtype(samples.dtype, np.floating):
        return samples.astype(np.float32)
    if np.issubdtype(samples.dtype, np.signedinteger):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    raise ValueError(f"expected floating-point numbers or signed integers, got {samples.dtype}")


def _soundfile() -> Any:
    try:
        return importlib.import_module("soundfile")
    except (ImportError, OSError):  # the package, or the library that it wraps, is missing
        return None
