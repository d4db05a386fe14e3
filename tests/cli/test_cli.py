"""The command line: what info prints, what a demo run writes, what bad arguments say."""

import ast
import inspect
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from sklearn.datasets import load_digits

import vqkernels
from vqkernels import cli
from vqkernels.cli import _figure, _measure, _twins, demo, info

ROOT = Path(__file__).parents[2]
IMAGES, CODES, STEPS = 120, 32, 40
TINY = f"--device cpu --steps {STEPS} --batch-size 48 --images {IMAGES} --codes {CODES} --threads 1".split()


@pytest.fixture(autouse=True)
def restored_cudnn():
    deterministic = torch.backends.cudnn.deterministic
    yield
    torch.backends.cudnn.deterministic = deterministic


def run_demo(folder, capsys):
    assert cli.main(["demo", *TINY, "--out", str(folder)]) == 0
    return json.loads((folder / "metrics.json").read_text()), capsys.readouterr().out


def test_info_says_what_runs_where(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    environment, table = lines[: lines.index("")], lines[lines.index("") + 1 :]
    values = dict(re.split(r"  +", line, maxsplit=1) for line in environment)
    assert values["vqkernels"] == vqkernels.__version__
    assert values["torch"].startswith(torch.__version__)
    assert values["threads"] == str(torch.get_num_threads())
    assert vqkernels.build_info()["compiler"] in values["built with"]

    header = table[0].split()
    rows = {line.split()[0]: re.split(r"  +", line) for line in table[1 : table.index("")]}
    assert set(rows) >= {"nearest_code", "code_statistics", "ema_update_", "vector_quantize"}
    blank, plain, *rest = table[table.index("") :]
    assert blank == ""
    assert plain == "plain PyTorch, on every device: rope_tables, timestep_embedding"
    for operation in plain.split(": ")[1].split(", "):
        assert "backend" not in inspect.signature(getattr(vqkernels, operation)).parameters
    public = {name for name in vqkernels.ops.__all__ if inspect.isfunction(getattr(vqkernels.ops, name))}
    assert public - {"build_info"} == set(rows) | {"rope_tables", "timestep_embedding"}
    reasons = dict(re.match(r"(\[\d+\]) (.+)", line).groups() for line in rest[1:])
    for row in rows.values():
        cells = dict(zip(header, row, strict=True))
        assert cells["native/cpu"] == cells["reference/cpu"] == "yes"
        assert (cells["reference/cuda"] == "yes") == torch.cuda.is_available()
        for cell in cells.values():
            if cell.startswith("no ["):
                assert reasons[cell.removeprefix("no ")]


@pytest.mark.parametrize("operation", ["nearest_code", "vector_quantize"])
def test_info_agrees_with_the_calls(operation):
    z, codebook = torch.randn(5, 3), torch.randn(4, 3)
    for backend in ("native", "triton", "reference"):
        if info.why_not(operation, backend, "cpu") is None:
            getattr(vqkernels, operation)(z, codebook, backend=backend)
        else:
            with pytest.raises(RuntimeError, match=backend):
                getattr(vqkernels, operation)(z, codebook, backend=backend)


def test_info_needs_no_optional_package(capsys, monkeypatch):
    for package in ("rich", "matplotlib", "sklearn"):
        monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["info"]) == 0
    assert "nearest_code" in capsys.readouterr().out


def test_demo_trains_both_and_writes_what_it_saw(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    folder = tmp_path / "new" / "folder"
    metrics, printed = run_demo(folder, capsys)

    training, held_out = IMAGES * 5 // 6, IMAGES // 6
    assert metrics["images"] == {"training": training, "held_out": held_out}
    assert metrics["equal_weights"]["compared_codes"] == held_out * 16
    assert metrics["equal_weights"]["compared_losses"] == math.ceil(training / 48)
    assert metrics["equal_weights"]["equal_codes"] >= 1 - 1 / (held_out * 16)
    # Losses near 1 in float32, summed in different orders.
    assert metrics["equal_weights"]["largest_loss_difference"] <= 16 * torch.finfo(torch.float32).eps

    images = torch.from_numpy(load_digits().images[:IMAGES] / 16)
    mean_digit_error = (images[training:] - images[:training].mean(0)).square().mean().item()
    for name in ("reference", "fused"):
        model = metrics[name]
        assert len(model["losses"]) == STEPS
        assert model["losses"][-1] < 0.6 * model["losses"][0]
        assert model["psnr_db"] > -10 * math.log10(mean_digit_error)
        assert 1 < model["perplexity"] <= model["used_codes"] <= CODES
        for key in ("quantizer_seconds", "step_seconds"):
            assert 0 < model[key]["minimum"] <= model[key]["median"] < 60
        assert f"{model['psnr_db']:.2f}" in printed
    assert metrics["reference"]["losses"][0] == pytest.approx(metrics["fused"]["losses"][0], rel=1e-5)
    ratio = metrics["reference_over_fused"]["step_seconds"]["median"]
    assert ratio == metrics["reference"]["step_seconds"]["median"] / metrics["fused"]["step_seconds"]["median"]

    assert metrics["provenance"]["torch"] == torch.__version__
    assert metrics["provenance"]["threads"] == 1
    assert metrics["provenance"]["device"] == "cpu"
    assert metrics["options"]["steps"] == STEPS
    assert str(folder / "demo.png") in printed

    picture = imread(folder / "demo.png")[..., :3]
    assert min(picture.shape[:2]) > 800
    assert 0.02 < (picture < 0.5).any(-1).mean() < 0.6
    # Every third of the picture in either direction shows something.
    for rows in torch.from_numpy(picture).tensor_split(3, 0):
        for part in rows.tensor_split(3, 1):
            assert part.std() > 0.05


def test_demo_repeats_itself(tmp_path, capsys):
    first, second = (run_demo(tmp_path / name, capsys)[0] for name in ("first", "second"))
    for metrics in (first, second):
        for name in ("reference", "fused"):
            del metrics[name]["quantizer_seconds"], metrics[name]["step_seconds"]
        del metrics["reference_over_fused"], metrics["options"]["out"]
    assert first == second


def test_twins_start_equal_and_differ_in_the_quantizer_alone():
    twins = _twins.build(16, 3, torch.device("cpu"))
    assert type(twins["reference"].quantizer) is vqkernels.reference.VectorQuantize
    assert type(twins["fused"].quantizer) is vqkernels.nn.VectorQuantize
    torch.testing.assert_close(twins["fused"].state_dict(), twins["reference"].state_dict(), rtol=0, atol=0)


def test_disagreement_is_seen():
    """A fused model that takes other codes where there is ink does not pass for equal."""
    twins = _twins.build(16, 0, torch.device("cpu"))
    images = demo.digits(60)
    honest = twins["fused"].codes
    twins["fused"].codes = lambda x: (honest(x) + (x[:, :, ::2, ::2].squeeze(1) > 0.9)) % 16
    agreement = _measure.agreement_at_equal_weights(twins, images, images, batch_size=60, seed=0)
    unequal = (images[:, :, ::2, ::2] > 0.9).double().mean().item()
    assert agreement["equal_codes"] == pytest.approx(1 - unequal)
    assert 0.05 < unequal < 0.95


def test_quality_measures():
    assert _measure.perplexity(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert _measure.perplexity(torch.tensor([0, 9])) == pytest.approx(1)
    assert _measure.perplexity(torch.tensor([1, 3])) == pytest.approx(4 / 3**0.75)
    assert _measure.psnr(torch.zeros(2, 3), torch.full((2, 3), 0.1)) == pytest.approx(20, abs=1e-5)
    assert _measure.psnr(torch.ones(4), torch.tensor([1.5, 1, 1, 0])) == pytest.approx(10 * math.log10(4), abs=1e-5)


def test_colours_are_those_of_the_patches():
    model = _twins.build(4, 0, torch.device("cpu"))["reference"]
    white, black, left, top = 0, 1, 2, 3
    patches = {white: [[0, 0], [0, 0]], black: [[1, 1], [1, 1]], left: [[1, 0], [1, 0]], top: [[1, 1], [0, 0]]}
    images = torch.stack([torch.tensor(patches[code], dtype=torch.float32).repeat(2, 2) for code in range(4)])
    model.codes = lambda x: torch.arange(4).reshape(4, 1, 1).expand(4, 2, 2)
    colors = _figure.code_colors(model, images.unsqueeze(1))
    assert colors[white].tolist() == [1, 1, 1]
    assert colors[black].tolist() == pytest.approx([0.2, 0.2, 0.2])
    assert colors[left].max() == pytest.approx(0.6)
    assert colors[left].tolist() != colors[top].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["teach"], "invalid choice"),
        (["demo", "--steps", "0"], "--steps: expected an integer of at least 1, got '0'"),
        (["demo", "--batch-size", "many"], "--batch-size: expected an integer of at least 1, got 'many'"),
        (["demo", "--images", "1798"], "--images: expected an integer from 60 to 1797, got '1798'"),
        (["demo", "--images", "59"], "--images: expected an integer from 60 to 1797, got '59'"),
        (["demo", "--codes", "1"], "--codes: expected an integer of at least 2, got '1'"),
        (["demo", "--seed", "-1"], "--seed: expected"),
        (["demo", "--threads", "-1"], "--threads: expected"),
        (["demo", "--device", "tpu"], "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (["demo", "--device", "meta"], "--device: expected cpu, cuda or cuda:N, got 'meta'"),
        (["demo", "--device", "cuda:99"], "--device: torch finds"),
    ],
)
def test_bad_arguments_exit_with_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(_twins, "train", lambda *args, **options: pytest.fail("trained first"))
    for name in ("file", "file/folder"):
        with pytest.raises(SystemExit) as raised:
            cli.main(["demo", *TINY, "--out", str(tmp_path / name)])
        assert raised.value.code == 2
        assert f"--out: cannot write to {str(tmp_path / name)!r}" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["matplotlib", "rich", "sklearn"])
def test_a_missing_package_names_the_extra(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf'the demo needs {package} .*pip install "vqkernels\[demo\]"'):
        cli.main(["demo", *TINY, "--out", str(tmp_path / "demo")])
    assert not list(tmp_path.iterdir())


def required():
    """Packages and extra of every call of `require` in the source of the commands, by command."""
    for path in sorted((ROOT / "vqkernels" / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "require":
                options = {option.arg: ast.literal_eval(option.value) for option in node.keywords}
                packages = [ast.literal_eval(package) for package in node.args]
                yield path.stem, packages, options.get("extra") or options.get("command", "demo")


def test_extras_that_messages_name_bring_the_packages():
    """What `pip install` is told to install is in pyproject.toml, with the package that was missing."""
    text = (ROOT / "pyproject.toml").read_text()
    section = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[", text, re.DOTALL | re.MULTILINE)[1]
    extras = {
        name: {re.match(r"[\w-]+", package)[0] for package in re.findall(r'"(.+?)"', packages)}
        for name, packages in re.findall(r"^(\w+) = \[(.*?)\]$", section, re.DOTALL | re.MULTILINE)
    }
    found = list(required())
    assert {command for command, _, _ in found} == {"demo", "encode", "sample", "train_dit"}
    distributions = {"PIL": "pillow", "sklearn": "scikit-learn"}
    for command, packages, extra in found:
        assert extra in extras, command
        assert {distributions.get(package, package) for package in packages} <= extras[extra], command


def test_interruption_is_not_a_traceback(monkeypatch, tmp_path, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(_twins, "train", interrupted)
    assert cli.main(["demo", *TINY, "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
