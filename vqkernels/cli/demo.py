"""`python -m vqkernels demo`: a VQ-VAE on handwritten digits, reference and fused side by side."""

import argparse
import importlib
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vqkernels
from vqkernels import _C
from vqkernels.cli import _measure, _twins
from vqkernels.models import save_checkpoint

FEWEST_IMAGES, MOST_IMAGES = 60, 1797


def run(arguments: argparse.Namespace) -> None:
    """Trains, compares, writes demo.png, metrics.json and model.pt, the fused model, and prints a table.

    Raises:
        argparse.ArgumentError: the device or the output folder cannot be used.
        SystemExit: an optional package is missing; the message names the extra that brings it.
    """
    start = time.perf_counter()
    require("matplotlib", "rich", "sklearn")
    from vqkernels.cli import _figure, _report

    device = choose_device(arguments.device)
    folder = writable_folder(arguments.out)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.deterministic = True

    images = digits(arguments.images).to(device)
    training, held_out = images.tensor_split([len(images) - len(images) // 6])
    twins = _twins.build(arguments.codes, arguments.seed, device)
    with _report.progress_bar(arguments.steps) as report:
        history = _twins.train(
            twins,
            training,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            report=report,
        )
    metrics = {
        "provenance": provenance(device),
        "options": {key: value for key, value in vars(arguments).items() if key != "run"},
        "images": {"training": len(training), "held_out": len(held_out)},
        **_measure.measure(twins, history, training, held_out, batch_size=arguments.batch_size, seed=arguments.seed),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    save_checkpoint(twins["fused"], folder / "model.pt")
    _figure.draw(folder / "demo.png", twins, training, held_out, metrics)
    _report.print_table(metrics)
    names = ", ".join(str(folder / name) for name in ("demo.png", "metrics.json", "model.pt"))
    print(f"{names} written; {time.perf_counter() - start:.0f} s in all")


def require(*packages: str, command: str = "demo", extra: str | None = None) -> None:
    """Imports packages of an extra, by default the one that has the command's name."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            name = "pillow" if package == "PIL" else package
            message = f'the {command} needs {name} ({error}): pip install "vqkernels[{extra or command}]"'
            raise SystemExit(message) from None


def choose_device(name: str) -> torch.device:
    """The device of that name; for "auto" the GPU where torch finds one, else the CPU."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(("cuda" if cuda else "cpu") if name == "auto" else name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentError(None, f"argument --device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= cuda:
        raise argparse.ArgumentError(None, f"argument --device: torch finds {cuda} CUDA devices, got {name!r}")
    return device


def writable_folder(name: str) -> Path:
    """The folder of that name, made where it is missing, after a file has been written to it."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise argparse.ArgumentError(None, f"argument --out: cannot write to {name!r}: {error.strerror}") from None
    return folder


def digits(count: int) -> Tensor:
    """The first images of scikit-learn's 1,797 handwritten digits, [count, 1, 8, 8] with values from 0 to 1."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images[:count] / 16).float().unsqueeze(1)


def provenance(device: torch.device) -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        "vqkernels": vqkernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "compiler": vqkernels.build_info()["compiler"],
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cpu_capability": _C.cpu_capability(),
        "threads": torch.get_num_threads(),
    }
