"""`python -m vqkernels encode`: the tokens of a folder of images or audio, alone or under torchrun.

Of every input `NAME` there is an output `NAME.npz` at the same place below the output folder, with three arrays:

- codes: int32, [h, w] of an image, [t] of audio.
- shape: int64, that of the input, [C, H, W] or [C, T], before it was filled up to multiples of the model's stride.
- source: int64 [2], size and time of change (ns) of the input file.

`manifest.json` says which model made them ("model": file, sha256, config, stride), and at the end of a run also which
there are ("files": input, output, codes, shape) and which inputs could not be read ("failed": input, reason).

Outputs of inputs that have not changed since are left alone, so that a run goes on where another one ended. A file is
encoded by itself: its codes do not depend on what else there is, or on the number of processes. They may depend on
the device and on the number of CPU threads, where the model's convolutions round differently and two codes are
equally near.
"""

import argparse
import hashlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels.cli.demo import choose_device, require, writable_folder
from vqkernels.models import VQVAE, load_checkpoint

MANIFEST = "manifest.json"


def run(arguments: argparse.Namespace) -> int:
    """Encodes what is not encoded yet, and writes the manifest.

    Returns:
        1 if an input could not be read, else 0.

    Raises:
        argparse.ArgumentError: a folder or the device cannot be used.
        SystemExit: no model, nothing to encode, or outputs of another model; the message says so.
    """
    if arguments.model is None:
        raise SystemExit(
            "encode needs a model, --model FILE: `python -m vqkernels demo --out demo` trains one and writes "
            "demo/model.pt; vqkernels.models.save_checkpoint writes any VQVAE"
        )
    require("numpy", "rich", command="encode", extra="demo")
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(arguments.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.deterministic = True

    model, description = _load(Path(arguments.model), device)
    if model.dimensions == 2:
        require("PIL", command="encode", extra="demo")
    data, out = Path(arguments.data), writable_folder(arguments.out)
    inputs = find_inputs(data, out, model.dimensions)
    with _interruptible(), _processes(processes) as gather:
        if rank == 0:
            _claim(out, description, inputs, arguments.overwrite)
        inputs = gather(inputs)[0]  # the folder may have changed while the processes looked
        failed = _encode(model, data, out, inputs[rank::processes], rank, processes)
        failures = [failure for part in gather(failed) for failure in part]
        if rank > 0:
            return 0
        return _report(out, description, inputs, sorted(failures, key=lambda failure: failure["input"]))


def find_inputs(data: Path, out: Path, dimensions: int) -> list[str]:
    """The paths, relative to the folder and sorted, of all files in it that can be read, without hidden ones.

    Args:
        data: the folder.
        out: a folder to leave out.
        dimensions: 2 to look for images, 1 for audio.

    Raises:
        argparse.ArgumentError: there is no such folder, or the one to leave out contains it.
        SystemExit: there is no such file.
    """
    from vqkernels.cli import _media

    if not data.is_dir():
        raise argparse.ArgumentError(None, f"argument --data: expected a folder, got {str(data)!r}")
    leave_out = out.resolve()
    if leave_out in (data.resolve(), *data.resolve().parents):
        raise argparse.ArgumentError(
            None, f"argument --out: expected a folder that does not contain --data, got {str(out)!r}"
        )
    files = [
        path.relative_to(data)
        for path in data.rglob("*")
        if path.is_file() and leave_out not in (data.resolve() / path.relative_to(data)).parents
    ]
    files = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    known = _media.suffixes(dimensions)
    inputs = sorted(path.as_posix() for path in files if path.suffix.lower() in known)
    if inputs:
        return inputs
    kind = "images" if dimensions == 2 else "audio"
    found = ", ".join(sorted({path.suffix or "none" for path in files})) or "no file at all"
    raise SystemExit(
        f"--data {str(data)!r}: the model is one of {kind}, expected files with a suffix of "
        f"{', '.join(sorted(known))}; got {found}"
    )


def encode_one(model: VQVAE, values: Tensor) -> Tensor:
    """Codes, int32 [h, w] or [t], of one input [C, H, W] or [C, T], filled up at the end with its last values."""
    padding = [extra for side in reversed(values.shape[1:]) for extra in (0, -side % model.stride)]
    return model.codes(F.pad(values.unsqueeze(0), padding, mode="replicate"))[0].to(torch.int32)


def _load(path: Path, device: torch.device) -> tuple[VQVAE, dict[str, Any]]:
    try:
        model = load_checkpoint(path, device=device)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SystemExit(f"--model {str(path)!r}: {error.strerror or error}") from None
    except ValueError as error:
        raise SystemExit(f"--model {error}") from None
    return model, {"file": path.name, "sha256": sha256, "config": model.config, "stride": model.stride}


def _claim(out: Path, description: dict[str, Any], inputs: list[str], overwrite: bool) -> None:
    """Writes down which model the outputs are of, and refuses those of another one, or removes them."""
    path = out / MANIFEST
    if overwrite:
        for name in inputs:
            _output(out, name).unlink(missing_ok=True)
    if path.exists() and not overwrite:
        try:
            sha256 = json.loads(path.read_text())["model"]["sha256"]
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"{path}: expected a manifest of encode, got something else") from None
        if sha256 != description["sha256"]:
            raise SystemExit(f"--out {str(out)!r} holds codes of another model: pass another folder, or --overwrite")
    else:
        _write(path, json.dumps({"model": description}, indent=2).encode())


def _encode(model: VQVAE, data: Path, out: Path, inputs: list[str], rank: int, processes: int) -> list[dict[str, str]]:
    """Encodes inputs without an output of their present version; returns those that cannot be read, and why."""
    from vqkernels.cli import _media

    failed = []
    device = next(model.parameters()).device
    with _progress_bar(len(inputs), rank, processes) as advance:
        for name in inputs:
            target = _output(out, name)
            if not _is_encoded(target, data / name):
                try:
                    values = _media.read(data / name, model.dimensions, model.in_channels)
                except (OSError, ValueError) as error:
                    failed.append({"input": name, "reason": " ".join(str(error).split()) or type(error).__name__})
                    target.unlink(missing_ok=True)
                else:
                    codes = encode_one(model, values.to(device)).cpu()
                    _write(target, _archive(codes, values.shape, _version(data / name)))
            advance(name)
    return failed


def _report(out: Path, description: dict[str, Any], inputs: list[str], failed: list[dict[str, str]]) -> int:
    import numpy as np

    missing = {failure["input"] for failure in failed}
    files = []
    for name in inputs:
        if name not in missing:
            with np.load(_output(out, name)) as content:
                codes, shape = list(content["codes"].shape), content["shape"].tolist()
            files.append({"input": name, "output": f"{name}.npz", "codes": codes, "shape": shape})
    manifest = {"model": description, "files": files, "failed": failed}
    _write(out / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    print(f"{len(files)} of {len(inputs)} files are encoded; {out / MANIFEST} lists them")
    for failure in failed:
        print(f"cannot read {failure['input']}: {failure['reason']}", file=sys.stderr)
    return 1 if failed else 0


def _output(out: Path, name: str) -> Path:
    return out / f"{name}.npz"


def _version(source: Path) -> list[int]:
    status = source.stat()
    return [status.st_size, status.st_mtime_ns]


def _is_encoded(target: Path, source: Path) -> bool:
    import numpy as np

    try:
        with np.load(target) as content:
            return content["source"].tolist() == _version(source)
    except (OSError, ValueError, KeyError):
        return False


def _archive(codes: Tensor, shape: torch.Size, version: list[int]) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, codes=codes.numpy(), shape=np.asarray(shape, np.int64), source=np.asarray(version, np.int64))
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Writes a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _processes(processes: int) -> Iterator[Callable[[Any], list[Any]]]:
    """The processes of torchrun; gives a function that gathers an object of each."""
    if processes == 1:
        yield lambda value: [value]
        return
    distributed = torch.distributed
    # Shares take as long as they take; torchrun ends all processes when one is lost.
    distributed.init_process_group("gloo", timeout=timedelta(days=365))

    def gather(value: Any) -> list[Any]:
        values = [None] * processes
        distributed.all_gather_object(values, value)
        return values

    try:
        yield gather
    finally:
        distributed.destroy_process_group()


@contextmanager
def _progress_bar(total: int, rank: int, processes: int) -> Iterator[Callable[[str], None]]:
    """A progress bar of the first process's share; gives a function that takes the name of what is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    label = "encoding" if processes == 1 else f"encoding, first of {processes} shares"
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, disable=rank > 0) as progress:
        task = progress.add_task("", total=total)
        yield lambda name: progress.update(task, advance=1, description=name)


@contextmanager
def _interruptible() -> Iterator[None]:
    """A request to terminate, such as torchrun's when another process failed, is like the user's interruption."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
