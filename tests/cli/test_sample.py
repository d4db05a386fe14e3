"""The sample command: what it writes, images to begin with and parts to keep, and what bad files say."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from sklearn.datasets import load_digits

from vqkernels import cli
from vqkernels.models import VQVAE, save_checkpoint
from vqkernels.training.config import DiTConfig
from vqkernels.training.data import Labelled
from vqkernels.training.dit import DiTTraining
from vqkernels.training.loop import fit
from vqkernels.training.sampling import DiTSampler
from vqkernels.training.spaces import Latents, Pixels


def write_checkpoint(path, space, **options):
    config = DiTConfig(**{"batch_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2, **options})
    data = Labelled(torch.rand(20, 1, 8, 8), torch.arange(20) % 10)
    module = DiTTraining(config, space, data)
    # The published start says nothing about class and time yet.
    for model in (module.model, module.averaged_model):
        torch.manual_seed(1)
        for parameter in (model.final_layer.linear.weight, model.final_layer.adaLN_modulation[1].weight):
            torch.nn.init.normal_(parameter, std=0.1)
    fit(module, path, steps=1, save_every=1, device=torch.device("cpu"), resume=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints: a flow, a diffusion with learned variance, one of latents, and one without "no class"."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    write_checkpoint(folder / "flow.ckpt", Pixels())
    write_checkpoint(folder / "diffusion.ckpt", Pixels(), prediction="v", learned_sigma=True)
    vqvae = VQVAE(1, 16, residual_channels=8, downsamplings=1, codebook_size=512, codebook_dim=8)
    write_checkpoint(folder / "latents.ckpt", Latents.of(vqvae, torch.rand(20, 1, 8, 8)))
    write_checkpoint(folder / "always.ckpt", Pixels(), class_dropout=0.0)
    return folder


@pytest.fixture
def draw(models, tmp_path):
    """Runs the command; returns the array."""

    def run(*arguments, model="flow"):
        names = {"--model": models / f"{model}.ckpt", "--out": tmp_path / "s.png", "--npy": tmp_path / "s.npy"}
        options = [str(part) for pair in names.items() for part in pair]
        assert cli.main(["sample", "--device", "cpu", "--steps", "4", *options, *map(str, arguments)]) == 0
        return np.load(tmp_path / "s.npy")

    return run


@pytest.fixture
def digit(tmp_path):
    """A real digit, and the name of its picture."""
    values = load_digits().images[3]
    Image.fromarray(np.round(values * 255 / 16).astype(np.uint8)).save(tmp_path / "digit.png")
    return np.round(values * 255 / 16) / 255, tmp_path / "digit.png"


@pytest.fixture
def right_half(tmp_path):
    """The name of a mask that is white on the right."""
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_what_is_drawn_is_written(draw, tmp_path, capsys):
    images = draw("--class", 3, 7, "--count", 5)
    assert images.shape == (10, 8, 8)
    assert images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
    picture = imread(tmp_path / "s.png")
    assert picture.shape[0] > 2 * 50
    assert picture.shape[1] > 5 * 50
    assert picture.std() > 0.05
    assert "10 images" in capsys.readouterr().out
    assert draw().shape == (80, 8, 8)


@pytest.mark.parametrize(
    ("model", "method"),
    [("flow", "euler"), ("flow", "heun"), ("flow", "ddim")]
    + [("diffusion", method) for method in ("ddpm", "ddim", "euler")],
)
def test_options_change_the_images_and_the_seed_repeats_them(draw, model, method):
    options = ["--method", method, "--class", 1, "--count", 3]
    first = draw(*options, model=model)
    assert np.isfinite(first).all()
    assert np.array_equal(draw(*options, model=model), first)
    for changed in (["--seed", 1], ["--guidance", 5], ["--steps", 3], ["--class", 2]):
        assert not np.array_equal(draw(*options, *changed, model=model), first)


def test_the_reference_draws_the_same_but_for_rounding(draw):
    np.testing.assert_allclose(draw("--reference"), draw(), atol=1e-4)


def test_an_image_to_begin_with(draw, digit):
    values, name = digit
    distances = []
    for strength in (0.25, 0.5, 1):
        images = draw("--init", name, "--strength", strength, "--class", 3)
        distances.append(np.abs(images - values).mean())
    assert distances[0] < distances[1] < distances[2]
    assert np.array_equal(images, draw("--class", 3))  # at full strength nothing is left of it


@pytest.mark.parametrize(("model", "method"), [("flow", "heun"), ("diffusion", "ddpm"), ("latents", "euler")])
def test_pixels_outside_the_mask_stay(draw, digit, right_half, model, method):
    values, name = digit
    options = ["--class", 3, 5, "--count", 4, "--method", method]
    images = draw("--init", name, "--mask", right_half, *options, model=model)
    np.testing.assert_array_equal(images[:, :, :4], np.broadcast_to(values[:, :4].astype(np.float32), (8, 8, 4)))
    drawn = images[:, :, 4:]
    assert np.abs(drawn - values[:, 4:]).mean() > 0.05
    if model != "latents":  # those of an untrained model have the same nearest codes whatever they are drawn for
        assert not np.array_equal(drawn[:4], drawn[4:])
        # The known half is not only pasted: it has a say in the other.
        assert not np.array_equal(drawn, draw(*options, model=model)[:, :, 4:])


def test_arrays_and_other_sizes_as_images(draw, digit, tmp_path, right_half):
    values, name = digit
    np.save(tmp_path / "digit.npy", values)
    large = Image.open(name).resize((32, 24), Image.Resampling.NEAREST).convert("RGB")
    large.save(tmp_path / "large.png")
    options = ["--mask", right_half, "--class", 3]
    expected = draw("--init", name, *options)
    assert np.array_equal(draw("--init", tmp_path / "digit.npy", *options), expected)
    assert np.array_equal(draw("--init", tmp_path / "large.png", *options), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_black(draw, digit, tmp_path, right_half, mode):
    """A digit drawn in white on a transparent ground, whose hidden colour is white too, is that digit on black."""
    values = np.asarray(Image.open(digit[1]))
    if mode == "P":
        clear = Image.fromarray(np.full((8, 8), 255, np.uint8)).convert("P")
        clear.putpalette([level for level in range(256) for _ in "RGB"])
        clear.save(tmp_path / "clear.png", transparency=bytes([*[255] * 255, 0]))  # of the last colour, white
        values = np.zeros_like(values)
    else:
        white = [np.full((8, 8), 255, np.uint8)] * (len(mode) - 1)
        Image.fromarray(np.stack([*white, values], -1), mode).save(tmp_path / "clear.png")
    Image.fromarray(values).save(tmp_path / "black.png")
    options = ["--mask", right_half, "--class", 3]
    expected = draw("--init", tmp_path / "black.png", *options)
    assert np.array_equal(draw("--init", tmp_path / "clear.png", *options), expected)
    assert not np.array_equal(expected[0, :, :4], np.ones((8, 4)))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([3, 10]), ValueError, "labels: expected classes from 0 to 9, got 10"),
        (torch.tensor([-1]), ValueError, "labels: expected classes from 0 to 9, got -1"),
        (torch.tensor(3), ValueError, r"labels: expected shape \[N\], got \[\]"),
        (torch.tensor([3.0]), TypeError, "labels: expected a tensor of int64, got "),
        ([3], TypeError, "labels: expected a tensor of int64, got "),
    ],
)
def test_bad_labels(models, labels, error, message):
    sampler = DiTSampler.load(models / "flow.ckpt")
    with pytest.raises(error, match=message):
        sampler.draw(labels, steps=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "10"], "argument --class: expected an integer from 0 to 9, got '10'"),
        (["--count", "0"], "argument --count: expected an integer of at least 1, got '0'"),
        (["--method", "rk4"], "argument --method: invalid choice: 'rk4'"),
        (["--method", "ddpm"], "argument --method: expected ddim, euler or heun for a flow, got 'ddpm'"),
        (["--guidance", "inf"], "argument --guidance: expected a number of at least 0, got 'inf'"),
        (["--strength", "0.5"], "argument --strength: expected --init too"),
        (["--mask", "m.png"], "argument --mask: expected --init too"),
        (["--init", "digit.png"], "argument --init: expected --strength or --mask too"),
        (["--init", "digit.png", "--strength", "0"], "argument --strength: expected a number above 0"),
        (["--init", "digit.png", "--strength", "2"], "argument --strength: expected a number from 0 to 1, got '2'"),
    ],
)
def test_bad_arguments(draw, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        draw(*arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_picture_has_the_name_it_is_given(draw, tmp_path, capsys):
    for name in ("picture", "picture.jpg"):
        draw("--out", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as error:
        draw("--npy", tmp_path)
    assert error.value.code == 2
    assert "expected names of files, got" in capsys.readouterr().err


def test_what_a_model_cannot_do(draw, capsys):
    with pytest.raises(SystemExit):
        draw("--steps", 1001, model="diffusion")
    assert "argument --steps: expected from 1 to 1000, got 1001" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        draw(model="always")
    assert "argument --guidance: expected 1 for a model that was trained without" in capsys.readouterr().err
    assert draw("--guidance", 1, model="always").shape == (80, 8, 8)


def test_bad_files(draw, models, digit, right_half, tmp_path):
    bad = {
        name: tmp_path / name
        for name in ("text.png", "half.png", "deep.png", "shape.npy", "range.npy", "nan.npy", "object.npy", "empty.npy")
    }
    bad["text.png"].write_text("not an image")
    bad["half.png"].write_bytes(digit[1].read_bytes()[:60])
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(bad["deep.png"])
    bad["empty.npy"].touch()
    np.save(bad["shape.npy"], np.zeros((4, 4)))
    np.save(bad["range.npy"], np.full((8, 8), 16.0))
    np.save(bad["nan.npy"], np.full((8, 8), np.nan))
    np.save(bad["object.npy"], np.array([None]), allow_pickle=True)
    bad["missing.png"] = tmp_path / "missing.png"
    for name, path in bad.items():
        with pytest.raises(SystemExit, match=rf"--init '.*{name}': .+"):
            draw("--init", path, "--strength", 0.5)
        with pytest.raises(SystemExit, match=rf"--mask '.*{name}': .+"):
            draw("--init", digit[1], "--mask", path)

    flow = (models / "flow.ckpt").read_bytes()
    save_checkpoint(VQVAE(1, 16, downsamplings=1), tmp_path / "model.pt")
    content = torch.load(models / "flow.ckpt", weights_only=True)
    content["vqkernels.training"]["config"]["hidden_size"] = 32
    torch.save(content, tmp_path / "other_size.ckpt")
    content["vqkernels.training"].pop("config")
    torch.save(content, tmp_path / "no_config.ckpt")
    (tmp_path / "half.ckpt").write_bytes(flow[: len(flow) // 2])
    foreign = {
        "text.ckpt": b"text",
        "code.ckpt": Path(__file__).read_bytes(),
        "empty.ckpt": b"",
        "array.ckpt": b"\x93NUMPY",
    }
    for name, octets in foreign.items():
        (tmp_path / name).write_bytes(octets)
    unreadable = r"got a file that torch\.load\(weights_only=True\) cannot read"
    for name, got in {
        "model.pt": "got something else: it has no such record",
        "other_size.ckpt": r"got something else: Error\(s\) in loading state_dict for DiT: size mismatch for .+",
        "no_config.ckpt": "got something else: it has no 'config'",
        **dict.fromkeys(["half.ckpt", *foreign], unreadable),
    }.items():
        message = rf"^--model .*{name}: expected a checkpoint of a training run of 'dit', {got}$"
        with pytest.raises(SystemExit, match=message):
            draw("--model", tmp_path / name)
    with pytest.raises(SystemExit, match=r"--model '.*nowhere\.ckpt': No such file"):
        draw("--model", tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize("package", ["matplotlib", "rich"])
def test_a_missing_package_is_named(draw, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf'the sample command needs {package} .* pip install "vqkernels\[train\]"'):
        draw()
