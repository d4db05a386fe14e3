"""The train command: what a run writes, that it can be stopped and resumed, and what bad arguments say."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from vqkernels import cli
from vqkernels.cli._runs import folder_of_run
from vqkernels.models import VQVAE, save_checkpoint
from vqkernels.training import classifier
from vqkernels.training.metrics import FRECHET

ROOT = Path(__file__).parents[2]
SMALL_MODEL = ["--batch-size", "8", "--hidden-size", "16", "--depth", "1", "--num-heads", "2"]
TINY = ["--device", "cpu", "--threads", "1", "--sampling-steps", "2", *SMALL_MODEL]


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch):
    monkeypatch.setattr(classifier, "EPOCHS", 2)


def train(folder, *arguments, options=TINY):
    return cli.main(["train", "dit", "--data", "digits", "--out", str(folder), *options, *map(str, arguments)])


def content(folder):
    return torch.load(folder / "checkpoint.ckpt", weights_only=True)


def assert_same_weights(first, second):
    torch.testing.assert_close(content(first)["state_dict"], content(second)["state_dict"], rtol=0, atol=0)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_steps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "EPOCHS", 1)
        assert train(folder, "--steps", 2) == 0
    return folder


@pytest.fixture
def run(two_steps, tmp_path):
    """The folder of a run of two steps."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def test_a_run_writes_what_it_saw(tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert train(folder, "--steps", 3, "--guidance", 2.5, "--seed", 4) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"checkpoint.ckpt", "metrics.json", "samples.png"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["config"]["hidden_size"] == 16
    assert metrics["config"]["seed"] == 4
    assert metrics["config"]["space"] == "pixels"
    assert metrics["provenance"]["torch"] == torch.__version__
    assert metrics["provenance"]["threads"] == 1
    assert metrics["trained_by_this_command"]["steps"] == 3
    assert metrics["sampling"]["guidance"] == 2.5
    assert metrics["digits"] == {"training": 1437, "held_out": 360}
    quality = metrics["quality"]
    assert quality["samples"] == 360
    assert quality["accuracy_of_held_out_digits"] > 0.5
    assert quality["accuracy_of_samples"] < 0.5  # after three steps samples are noise
    assert len(quality["accuracy_of_samples_by_class"]) == 10
    distances = quality[FRECHET]
    assert distances["samples_to_training_digits"] > distances["held_out_to_training_digits"] > 0
    saved = content(folder)["vqkernels.training"]["config"]
    assert saved == {name: value for name, value in metrics["config"].items() if name != "space"}
    for text in (
        "steps 3",
        "hidden_size 16",
        "seed 4",
        "3/3",
        "Fréchet distance in the features of a digits classifier",
    ):
        assert text in printed
    image = imread(folder / "samples.png")
    assert image.shape[0] > 9 * 50  # a row of real digits, eight of samples
    assert image.shape[1] > 10 * 50
    assert image.std() > 0.05


def test_a_finished_run_goes_on_with_more_steps_or_draws_again(tmp_path, run, capsys):
    train(tmp_path / "whole", "--steps", 4)
    assert train(run, "--resume", "--steps", 4, options=["--device", "cpu", "--sampling-steps", "2"]) == 0
    assert_same_weights(tmp_path / "whole", run)
    first = (run / "metrics.json").read_text()
    checkpoint = (run / "checkpoint.ckpt").read_bytes()
    assert train(run, "--resume", "--method", "euler") == 0
    again = json.loads((run / "metrics.json").read_text())
    assert again["trained_by_this_command"]["steps"] == 0
    assert again["sampling"]["method"] == "euler" != json.loads(first)["sampling"]["method"]
    assert (run / "checkpoint.ckpt").read_bytes() == checkpoint


def test_a_terminated_process_goes_on_where_it_was(tmp_path):
    command = [sys.executable, "-m", "vqkernels", "train", "dit", "--out", str(tmp_path / "run"), *TINY]
    process = subprocess.Popen(
        [*command, "--steps", "100000", "--save-every", "1"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoint.ckpt").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped" in printed
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint.ckpt"]
    done = content(tmp_path / "run")["global_step"]
    assert train(tmp_path / "run", "--resume", "--steps", done + 2) == 0
    train(tmp_path / "whole", "--steps", done + 2)
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_latents_of_the_demo(tmp_path):
    vqvae = VQVAE(1, 16, residual_channels=8, downsamplings=1, codebook_size=16, codebook_dim=8)
    save_checkpoint(vqvae, tmp_path / "model.pt")
    assert train(tmp_path / "run", "--steps", 2, "--latents", tmp_path / "model.pt") == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]["space"] == "latents"
    (tmp_path / "model.pt").unlink()
    assert train(tmp_path / "run", "--resume", "--steps", 3) == 0


def test_a_run_that_was_stopped_can_be_measured_as_it_is(run, capsys):
    stopped = content(run)
    stopped["vqkernels.training"]["config"]["steps"] = 9
    torch.save(stopped, run / "checkpoint.ckpt")
    assert train(run, "--resume", "--steps", 2) == 0
    assert json.loads((run / "metrics.json").read_text())["config"]["steps"] == 2
    assert "2 steps of training" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "holds a run: --resume goes on with it"),
        (("--resume", "--seed", 1), "--resume keeps --seed as it was: expected 0 or nothing, got 1"),
        (("--resume", "--reference"), "--resume keeps --reference as it was: expected False or nothing, got True"),
        (("--resume", "--steps", 1), "--steps: expected at least the 2 that the run has done, got 1"),
    ],
)
def test_a_run_is_not_overwritten_or_changed(run, arguments, message):
    before = (run / "checkpoint.ckpt").read_bytes()
    with pytest.raises(SystemExit, match=message):
        train(run, *arguments)
    assert (run / "checkpoint.ckpt").read_bytes() == before


def test_files_that_are_no_checkpoints(tmp_path, run):
    good = (run / "checkpoint.ckpt").read_bytes()
    other = torch.load(run / "checkpoint.ckpt", weights_only=True)
    other["vqkernels.training"]["model"] = "prior"
    torch.save(other, tmp_path / "other.ckpt")
    other["vqkernels.training"] |= {"model": "dit", "config": {"size": 3}}
    torch.save(other, tmp_path / "version.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    other = torch.load(run / "checkpoint.ckpt", weights_only=True)
    del other["vqkernels.training"]["space"]
    torch.save(other, tmp_path / "incomplete.ckpt")
    save_checkpoint(VQVAE(1, 16, downsamplings=1), tmp_path / "model.ckpt")
    contents = [path.read_bytes() for path in tmp_path.glob("*.ckpt")]
    assert len(contents) == 5
    for bad in (*contents, good[: len(good) // 2], b"", b"text"):
        (run / "checkpoint.ckpt").write_bytes(bad)
        with pytest.raises(
            SystemExit, match=r"--resume: .*checkpoint\.ckpt: expected a checkpoint of a training run of"
        ):
            train(run, "--resume")
    (run / "checkpoint.ckpt").unlink()
    with pytest.raises(
        SystemExit, match=r"--resume: .*checkpoint\.ckpt.*No such file.* start it again without --resume"
    ):
        train(run, "--resume")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-heads", 3), "expected a .*3"),
        (("--patch-size", 3), "expected a multiple of 3"),
        (("--ema-decay", 1), "decay: expected a number from 0 to below 1, got 1"),
        (("--learned-sigma",), "learned_sigma: expected False for a flow"),
        (("--method", "ddpm"), "method: expected ddim, euler or heun for a flow"),
        (
            ("--prediction", "v", "--sampling-steps", 1001),
            "sampling: steps: expected from 1 to 1000, got 1001",
        ),
        (("--class-dropout", 0), "guidance: expected 1 for a model that was trained without class dropout"),
        (("--learning-rate", 1e30, "--steps", 5), "the loss of step .* is nan; nothing was saved"),
        (("--latents", "nowhere.pt"), "--latents 'nowhere.pt': No such file"),
        (("--latents", __file__), "--latents: .* expected a checkpoint of"),
    ],
)
def test_what_cannot_be_trained(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        train(tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "where", ["vqkernels.training.data.digits", "vqkernels.training.dit.DiTTraining.configure_optimizers"]
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_leaves_nothing(tmp_path, number, where, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(where, lambda *_: os.kill(os.getpid(), number) or time.sleep(60))
    for folder in (tmp_path / "new" / "run", tmp_path):
        if number == signal.SIGINT:
            assert train(folder) == 128 + number
            assert "interrupted" in capsys.readouterr().err
        else:
            with pytest.raises(SystemExit) as raised:
                train(folder)
            assert raised.value.code == 128 + number
        assert list(tmp_path.iterdir()) == []
        assert signal.getsignal(signal.SIGTERM) is handler
    with pytest.raises(SystemExit, match=r"--resume: .* No such file.* start it again without --resume"):
        train(tmp_path / "new" / "run", "--resume")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 0), "argument --steps: expected an integer of at least 1, got '0'"),
        (("--learning-rate", "nan"), "argument --learning-rate: expected a number of at least 0, got 'nan'"),
        (("--class-dropout", 1.5), "argument --class-dropout: expected a number from 0 to 1, got '1.5'"),
        (("--prediction", "y"), "argument --prediction: invalid choice: 'y'"),
        (("--data", "faces"), "argument --data: invalid choice: 'faces'"),
        (("--device", "tpu"), "argument --device: expected cpu"),
        (("--resume", "--latents", "x.pt"), "argument --latents: the checkpoint to resume has its own"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        train(tmp_path / "run", *arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason"),
    [("file", "File exists"), ("file/run", "Not a directory"), ("new/" + "a" * 256, "name too long")],
)
def test_a_folder_that_cannot_be_written(tmp_path, name, reason, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as error:
        train(tmp_path / name)
    assert error.value.code == 2
    assert re.search(f"argument --out: cannot write to '.*{name}': .*{reason}", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_folder_that_cannot_be_looked_into(tmp_path, monkeypatch, capsys):
    """As for another user's: root may look into all of them."""
    stat, mkdir = os.stat, os.mkdir

    def refused(call):
        def function(path, *args, **kwargs):
            if str(path).startswith(str(tmp_path / "closed" / "run")):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, *args, **kwargs)

        return function

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "stat", refused(stat))
    monkeypatch.setattr(os, "mkdir", refused(mkdir))
    with pytest.raises(SystemExit) as error:
        train(tmp_path / "closed" / "run")
    assert error.value.code == 2
    assert re.search("argument --out: cannot write to '.*closed/run': Permission denied", capsys.readouterr().err)


@pytest.mark.parametrize("existing", [True, False])
def test_only_folders_that_were_made_are_removed(tmp_path, existing):
    """Also where the name goes through folders that are not there, or through a link."""
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    for name, real in (("nothere/../out", "out"), ("link/../out", "elsewhere/out"), ("link/new/../out", "link/out")):
        folder = tmp_path / real
        if existing:
            folder.mkdir()
        before = sorted(tmp_path.rglob("*"))
        with folder_of_run(str(tmp_path / name)) as made:
            assert made.samefile(folder)
        assert sorted(tmp_path.rglob("*")) == before
        with folder_of_run(str(tmp_path / name)) as made:
            (made / "written").touch()
        assert (folder / "written").exists()
        shutil.rmtree(folder)
    assert not (tmp_path / "nothere").exists()


@pytest.mark.parametrize("package", ["lightning", "sklearn", "matplotlib", "rich"])
def test_a_missing_package_is_named(tmp_path, package, monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf'the train command needs {package} .* pip install "vqkernels\[train\]"'):
        train(tmp_path / "run")


def test_parsers_need_no_optional_package():
    code = (
        "import sys\n"
        "for name in ('lightning', 'sklearn', 'matplotlib', 'rich', 'numpy', 'PIL'): sys.modules[name] = None\n"
        "from vqkernels import cli\n"
        "cli.build_parser().parse_args(['train', 'dit'])\n"
        "cli.build_parser().parse_args(['sample'])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ)
