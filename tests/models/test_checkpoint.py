"""Models in files."""

import pytest
import torch

import vqkernels.nn
from vqkernels import reference
from vqkernels.models import VQVAE, load_checkpoint, save_checkpoint

SMALL = {"in_channels": 2, "hidden_channels": 8, "residual_channels": 4, "codebook_size": 16, "codebook_dim": 4}


@pytest.mark.parametrize("options", [{}, {"downsamplings": 1, "threshold_ema_dead_code": 2}, {"dimensions": 1}])
def test_a_model_comes_back_from_its_file(options, tmp_path):
    model = VQVAE(**SMALL, **options)
    x = torch.rand(3, 2, *[8] * model.dimensions)
    model(x)
    save_checkpoint(model, tmp_path / "model.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    for quantizer in (vqkernels.nn.VectorQuantize, reference.VectorQuantize):
        loaded = load_checkpoint(tmp_path / "model.pt", quantizer=quantizer)
        assert type(loaded.quantizer) is quantizer
        assert loaded.config == model.config
        assert not loaded.training
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert loaded.quantizer._codebook.threshold_ema_dead_code == options.get("threshold_ema_dead_code", 0)
    assert torch.equal(loaded.codes(x), model.eval().codes(x))


def test_a_checkpoint_runs_no_code(tmp_path):
    """Of pickled objects none but those of tensors are made."""

    class Command:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"format": "vqkernels.models.VQVAE", "config": {}, "state_dict": Command()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: expected a checkpoint"):
        load_checkpoint(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


def test_other_files_are_refused(tmp_path):
    model = VQVAE(**SMALL)
    save_checkpoint(model, tmp_path / "model.pt")
    content = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_bytes(b"text")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    record = {"format": "vqkernels.models.VQVAE", "config": model.config, "state_dict": {}}
    torch.save(record, tmp_path / "without_weights.pt")
    torch.save(record | {"config": {"codes": 3}}, tmp_path / "without_config.pt")
    torch.save(record | {"config": model.config | {"downsamplings": 1e30}}, tmp_path / "too_large.pt")
    torch.save(record | {"state_dict": {1: 2}}, tmp_path / "without_names.pt")
    torch.save({"format": "vqkernels.models.VQVAE"}, tmp_path / "nothing.pt")
    paths = [path for path in tmp_path.iterdir() if path.name != "model.pt"]
    assert len(paths) == 10
    for path in paths:
        with pytest.raises(ValueError, match=rf"{path.name}: expected a checkpoint of vqkernels\.models\.VQVAE"):
            load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "missing.pt")


@pytest.mark.parametrize("device", ["cpuu", "cuda:99"])
def test_a_bad_device_is_no_bad_file(device, tmp_path):
    model = VQVAE(**SMALL)
    save_checkpoint(model, tmp_path / "model.pt")
    with pytest.raises(Exception, match=r"(?i)device|CUDA") as expected:
        torch.zeros(1, device=device)
    with pytest.raises(expected.type, match=r"(?i)device|CUDA") as raised:
        load_checkpoint(tmp_path / "model.pt", device=device)
    assert "checkpoint" not in str(raised.value)


def test_devices_of_the_file_and_of_the_model_differ(tmp_path):
    """Weights in the file never are on the device that is asked for before the model is."""
    model = VQVAE(**SMALL)
    save_checkpoint(model, tmp_path / "model.pt")
    loaded = load_checkpoint(tmp_path / "model.pt", device="meta")
    assert {(name, value.shape, value.device.type) for name, value in loaded.state_dict().items()} == {
        (name, value.shape, "meta") for name, value in model.state_dict().items()
    }


def test_too_little_memory_is_no_bad_file(tmp_path, monkeypatch):
    def load(*_, **__):
        raise MemoryError

    save_checkpoint(VQVAE(**SMALL), tmp_path / "model.pt")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError):
        load_checkpoint(tmp_path / "model.pt")


def test_signals_through_the_model():
    model = VQVAE(**SMALL, dimensions=1)
    x = torch.rand(3, 2, 20)
    output = model(x)
    assert model.encode(x).shape == (3, 4, 5)
    assert output.indices.shape == (3, 5)
    assert output.reconstruction.shape == x.shape
    codes = model.codes(x)
    distances = torch.cdist(model.encode(x).mT.double(), model.quantizer.codebook.double())
    assert torch.equal(codes, distances.argmin(-1))
    assert model.decode_codes(codes).shape == x.shape
    for call, argument, message in (
        (model.encode, torch.rand(1, 2, 8, 8), r"signals of shape \[B, 2, T\], got \[1, 2, 8, 8\]"),
        (model.encode, torch.rand(1, 2, 6), r"length to be a multiple of 4, got \[6\]"),
        (model.decode, torch.rand(1, 4, 2, 2), r"a map of shape \[B, 4, t\], got \[1, 4, 2, 2\]"),
        (model.decode_codes, torch.zeros(1, 2, 2, dtype=torch.int64), r"shape \[B, t\], got \[1, 2, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call(argument)
    with pytest.raises(ValueError, match="dimensions: expected 1 or 2, got 3"):
        VQVAE(**SMALL, dimensions=3)
