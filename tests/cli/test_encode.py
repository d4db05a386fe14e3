"""The encode command: what it writes, that it goes on where it was stopped, and what bad inputs say."""

import json
import os
import signal
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqkernels import cli
from vqkernels.cli import _media, encode
from vqkernels.models import VQVAE, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = {"hidden_channels": 16, "residual_channels": 8, "codebook_size": 32, "codebook_dim": 8}
SIZES = {
    "a.png": (8, 8),
    "b.bmp": (5, 11),
    "deep/er/a.png": (13, 4),
    "c.PNG": (1, 1),
    "d.png": (16, 9),
    "e.png": (4, 4),
}


def write_image(path, size, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def images(tmp_path):
    """A folder of images; returns it and the pixels by name."""
    folder = tmp_path / "images"
    return folder, {name: write_image(folder / name, size, i) for i, (name, size) in enumerate(SIZES.items())}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(VQVAE(**SMALL), path)
    return path


def run(*arguments):
    return cli.main(["encode", "--device", "cpu", *map(str, arguments)])


def outputs(folder):
    """The arrays of all outputs, by the name of the output."""
    found = {}
    for path in sorted(folder.rglob("*.npz")):
        with np.load(path) as content:
            found[path.relative_to(folder).as_posix()] = {name: content[name] for name in content.files}
    return found


def assert_same_outputs(first, second):
    first, second = outputs(first), outputs(second)
    assert first.keys() == second.keys()
    for name, arrays in first.items():
        assert arrays.keys() == second[name].keys()
        assert all(np.array_equal(arrays[key], second[name][key]) for key in arrays)


def test_codes_are_those_of_the_model(images, checkpoint, tmp_path, capsys):
    folder, pixels = images
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_text("nor this")
    out = tmp_path / "out"
    assert run("--data", folder, "--out", out, "--model", checkpoint) == 0
    assert f"{len(SIZES)} of {len(SIZES)} files are encoded" in capsys.readouterr().out

    model = load_checkpoint(checkpoint)
    found = outputs(out)
    assert found.keys() == {f"{name}.npz" for name in SIZES}
    for name, (height, width) in SIZES.items():
        high, wide = -(-height // 4) * 4, -(-width // 4) * 4
        filled = np.pad(pixels[name], ((0, high - height), (0, wide - width), (0, 0)), mode="edge")
        codes = model.codes(torch.from_numpy(filled / np.float32(255)).permute(2, 0, 1).unsqueeze(0).contiguous())[0]
        arrays = found[f"{name}.npz"]
        assert arrays["codes"].dtype == np.int32
        assert np.array_equal(arrays["codes"], codes.numpy())
        assert arrays["shape"].tolist() == [3, height, width]

    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"]["config"] == model.config
    assert manifest["model"]["stride"] == 4
    assert manifest["failed"] == []
    assert manifest["files"] == [
        {
            "input": name,
            "output": f"{name}.npz",
            "codes": list(found[f"{name}.npz"]["codes"].shape),
            "shape": [3, *SIZES[name]],
        }
        for name in sorted(SIZES)
    ]


def test_an_interrupted_run_goes_on(images, checkpoint, tmp_path, monkeypatch, capsys):
    folder, _ = images
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("--data", folder, "--out", whole, "--model", checkpoint) == 0
    arguments = ("--data", folder, "--out", parts, "--model", checkpoint)

    encoded, encode_one, replace = [], encode.encode_one, os.replace

    def count(model, values):
        encoded.append(values)
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return encode_one(model, values)

    def interrupt_writing(source, target):
        if Path(target).name == "d.png.npz":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(encode, "encode_one", count)
    assert run(*arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(outputs(parts)) == 2
    monkeypatch.setattr(os, "replace", interrupt_writing)
    assert run(*arguments) == 130
    assert "d.png.npz" not in outputs(parts)
    monkeypatch.setattr(os, "replace", replace)
    assert run(*arguments) == 0
    assert not [path for path in parts.rglob("*") if path.name.endswith(".tmp")]
    assert_same_outputs(whole, parts)
    # Each once, but for the two that were interrupted.
    assert len(encoded) == len(SIZES) + 2

    assert run(*arguments) == 0
    assert len(encoded) == len(SIZES) + 2
    write_image(folder / "a.png", (8, 8), 99)
    later = time.time() + 5
    os.utime(folder / "a.png", (later, later))
    assert run(*arguments) == 0
    assert len(encoded) == len(SIZES) + 3
    write_image(folder / "b.png", (8, 8), 98)  # from a copy that keeps times
    os.utime(folder / "b.png", (later - 10**6, later - 10**6))
    assert run(*arguments) == 0
    assert len(encoded) == len(SIZES) + 4
    assert not np.array_equal(outputs(whole)["a.png.npz"]["codes"], outputs(parts)["a.png.npz"]["codes"])


def test_broken_files_are_told_and_left_out(images, checkpoint, tmp_path, capsys):
    folder, _ = images
    content = (folder / "d.png").read_bytes()
    (folder / "d.png").write_bytes(content[: len(content) // 2])
    (folder / "e.png").write_text("no image")
    (folder / "f.png").touch()
    out = tmp_path / "out"
    arguments = ("--data", folder, "--out", out, "--model", checkpoint)
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert "4 of 7 files are encoded" in printed.out
    manifest = json.loads((out / "manifest.json").read_text())
    assert [failure["input"] for failure in manifest["failed"]] == ["d.png", "e.png", "f.png"]
    assert all(failure["reason"] for failure in manifest["failed"])
    assert all(f"cannot read {name}: " in printed.err for name in ("d.png", "e.png", "f.png"))
    assert [file["input"] for file in manifest["files"]] == ["a.png", "b.bmp", "c.PNG", "deep/er/a.png"]
    assert len(outputs(out)) == 4

    (folder / "d.png").write_bytes(content)
    (folder / "e.png").unlink()
    (folder / "f.png").unlink()
    assert run(*arguments) == 0
    assert json.loads((out / "manifest.json").read_text())["failed"] == []


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, "-m", "vqkernels", "encode", "--device", "cpu", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_two_processes_share_the_files(images, checkpoint, tmp_path):
    folder, _ = images
    (folder / "broken.png").write_text("no image")
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert run("--data", folder, "--out", alone, "--model", checkpoint) == 1
    result = torchrun("--data", folder, "--out", together, "--model", checkpoint)
    assert result.returncode == 1
    assert result.stdout.count(f"{len(SIZES)} of {len(SIZES) + 1} files are encoded") == 1, result.stderr
    assert result.stderr.count("cannot read broken.png") == 1
    assert_same_outputs(alone, together)
    manifests = [json.loads((out / "manifest.json").read_text()) for out in (alone, together)]
    assert manifests[0] == manifests[1]
    (folder / "broken.png").unlink()
    assert torchrun("--data", folder, "--out", together, "--model", checkpoint).returncode == 0


def test_termination_is_an_interruption(images, checkpoint, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(encode, "encode_one", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert run("--data", images[0], "--out", tmp_path / "out", "--model", checkpoint) == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_audio(tmp_path, capsys):
    """Integers stand for fractions of the largest; several channels are averaged for a model of one."""
    folder, out, checkpoint = tmp_path / "audio", tmp_path / "out", tmp_path / "model.pt"
    folder.mkdir()
    model = VQVAE(**SMALL, in_channels=1, dimensions=1).eval()
    save_checkpoint(model, checkpoint)
    signal_ = np.sin(np.arange(150) / 5).astype(np.float32)
    whole = np.round(signal_ * 32000).astype(np.int16)
    np.save(folder / "floats.npy", signal_)
    np.save(folder / "integers.npy", whole)
    np.savez(folder / "stereo.npz", np.stack([signal_, np.zeros_like(signal_)]))
    with wave.open(str(folder / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(whole.astype("<i2").tobytes())
    np.save(folder / "nan.npy", np.full(9, np.nan))
    np.save(folder / "objects.npy", np.array([{}], dtype=object))
    np.save(folder / "map.npy", np.zeros((2, 3, 4)))
    np.save(folder / "nothing.npy", np.zeros(0))
    (folder / "cut.wav").write_bytes((folder / "sound.wav").read_bytes()[:100])

    assert run("--data", folder, "--out", out, "--model", checkpoint) == 1
    errors = capsys.readouterr().err
    for name, reason in {
        "nan.npy": "expected finite values, got NaN or Inf",
        "objects.npy": "Object arrays cannot be loaded",
        "map.npy": "expected an array of shape [T] or [C, T], got [2, 3, 4]",
        "nothing.npy": "expected at least one value, got shape [1, 0]",
        "cut.wav": "",
    }.items():
        assert f"cannot read {name}: {reason}" in errors
    found = outputs(out)
    for name, samples in {
        "floats.npy": signal_,
        "integers.npy": whole / np.float32(32768),
        "sound.wav": whole / np.float32(32768),
        "stereo.npz": signal_ / 2,
    }.items():
        filled = torch.from_numpy(np.pad(samples, (0, 2), mode="edge"))
        codes = model.codes(filled.view(1, 1, -1))[0]
        assert codes.shape == (38,)
        assert np.array_equal(found[f"{name}.npz"]["codes"], codes.numpy()), name
        assert found[f"{name}.npz"]["shape"].tolist() == [1, 150]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_of_every_width(width, tmp_path):
    least = -(2 ** (8 * width - 1))
    samples = np.array([[least, -1], [0, 1], [-least - 1, least // 2]])  # [T, C]
    octets = b"".join(
        int(value - least if width == 1 else value).to_bytes(width, "little", signed=width > 1)
        for value in samples.flatten()
    )
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, width, 8000, 0, "NONE", ""))
        file.writeframes(octets)
    audio = _media._to_float(_media._read_wav(tmp_path / "a.wav"))
    assert np.array_equal(audio, (samples.T / -least).astype(np.float32))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_images_are_converted_to_the_channels_of_the_model(channels, mode, tmp_path):
    write_image(tmp_path / "a.png", (3, 5), 0)
    values = _media.read(tmp_path / "a.png", 2, channels)
    expected = np.asarray(Image.open(tmp_path / "a.png").convert(mode), np.float32).reshape(3, 5, channels) / 255
    assert np.array_equal(values.numpy(), expected.transpose(2, 0, 1))


def test_outputs_of_another_model_are_kept(images, checkpoint, tmp_path):
    folder, _ = images
    out, fresh, other = tmp_path / "out", tmp_path / "fresh", tmp_path / "other.pt"
    assert run("--data", folder, "--out", out, "--model", checkpoint) == 0
    torch.manual_seed(1)
    save_checkpoint(VQVAE(**SMALL), other)
    with pytest.raises(SystemExit, match="holds codes of another model"):
        run("--data", folder, "--out", out, "--model", other)
    assert run("--data", folder, "--out", fresh, "--model", other) == 0
    assert run("--data", folder, "--out", out, "--model", other, "--overwrite") == 0
    assert_same_outputs(out, fresh)


def test_outputs_below_the_inputs_are_no_inputs(tmp_path):
    checkpoint = tmp_path / "model.pt"
    save_checkpoint(VQVAE(**SMALL, in_channels=1, dimensions=1), checkpoint)
    np.save(tmp_path / "a.npy", np.zeros(8, np.float32))
    for _ in range(2):
        assert run("--data", tmp_path, "--out", tmp_path / "out", "--model", checkpoint) == 0
    assert outputs(tmp_path / "out").keys() == {"a.npy.npz"}


def test_what_cannot_work_is_said(images, checkpoint, tmp_path, capsys):
    folder, _ = images
    empty, texts = tmp_path / "empty", tmp_path / "texts"
    empty.mkdir()
    texts.mkdir()
    (texts / "a.txt").touch()
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    out = ("--out", tmp_path / "out")
    for arguments, message in (
        (("--data", folder), r"needs a model, --model FILE: .*demo --out demo.* writes demo/model\.pt"),
        (("--data", folder, "--model", tmp_path / "missing.pt"), r"--model .*missing\.pt'?: No such file"),
        (("--data", folder, "--model", tmp_path / "text.pt"), r"text\.pt: expected a checkpoint of .*VQVAE"),
        (("--data", folder, "--model", tmp_path / "other.pt"), r"other\.pt: expected a checkpoint of .*VQVAE"),
        (("--data", empty, "--model", checkpoint), r"expected files with a suffix of .*\.png.*; got no file at all"),
        (("--data", texts, "--model", checkpoint), r"expected files with a suffix of .*\.png.*; got \.txt"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*arguments, *out)
    with pytest.raises(SystemExit) as raised:
        run("--data", tmp_path / "missing", "--model", checkpoint, *out)
    assert raised.value.code == 2
    assert "--data: expected a folder, got" in capsys.readouterr().err
    for too_high in (folder, tmp_path):
        with pytest.raises(SystemExit) as raised:
            run("--data", folder, "--model", checkpoint, "--out", too_high)
        assert raised.value.code == 2
        assert "--out: expected a folder that does not contain --data, got" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "package"), [("numpy", "numpy"), ("rich", "rich"), ("PIL", "pillow")])
def test_a_missing_package_names_the_extra(module, package, images, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=rf'the encode needs {package} .*pip install "vqkernels\[demo\]"'):
        run("--data", images[0], "--out", tmp_path / "out", "--model", checkpoint)


def test_the_model_of_the_demo_encodes(tmp_path):
    options = {"device": "cpu", "steps": 2, "batch-size": 8, "images": 60, "codes": 16, "out": tmp_path / "demo"}
    assert cli.main(["demo", *[f"--{name}={value}" for name, value in options.items()]]) == 0
    (tmp_path / "digits").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(
        tmp_path / "digits" / "0.png"
    )
    out = tmp_path / "out"
    assert run("--data", tmp_path / "digits", "--out", out, "--model", tmp_path / "demo" / "model.pt") == 0
    codes = outputs(out)["0.png.npz"]["codes"]
    assert codes.shape == (4, 4)
    assert ((codes >= 0) & (codes < 16)).all()
