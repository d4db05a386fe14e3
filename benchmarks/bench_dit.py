"""Diffusion transformers before and after `vqkernels.fuse`: time of a training step, and memory kept for backward.

Run it as `python -m benchmarks.bench_dit [words of a model's name] [--device cuda] [--out FILE]`: float32 and one
thread on CPU, bfloat16 on a GPU; interleaved rounds, their minimum. Matrix products, which fusion leaves as they are,
take most of the time.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vqkernels
from benchmarks import report
from benchmarks.measure import Settings
from benchmarks.timing import seconds_of
from vqkernels import models, reference

ROUNDS = 7
COLUMNS = ("model", "forward ms", "fused", "x", "step ms", "fused", "x", "compiled x", "saved MiB", "fused", "x")


class Subject(NamedTuple):
    """A model, what it is called with, and what of its result the loss is taken of."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    output: Callable[[Any], Tensor] = lambda result: result

    def __call__(self) -> Tensor:
        return self.output(self.model(*self.inputs))

    def on(self, device: torch.device) -> "Subject":
        """The same on a device, in bfloat16 where that is a GPU."""
        if device.type == "cpu":
            return self
        dtype = torch.bfloat16
        inputs = [t.to(device, dtype if t.is_floating_point() else None) for t in self.inputs]
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        return self._replace(model=self.model.to(device, dtype), inputs=tuple(leaves))


def block() -> Subject:
    """A DiT-S/2 block of 256 pixel images: B = 8, L = 256, D = 384, 6 heads."""
    x, c = torch.randn(8, 256, 384, requires_grad=True), torch.randn(8, 384, requires_grad=True)
    return Subject(reference.DiTBlock(384, 6), (x, c))


def own_dit() -> Subject:
    """DiT-S/2 of this package, 12 blocks, latents of 256 pixel images."""
    return Subject(models.DiT_models["DiT-S/2"](), _latents(2))


def large_dit() -> Subject:
    """DiT-XL/2 of this package, 28 blocks: too slow for one CPU thread."""
    return Subject(models.DiT_models["DiT-XL/2"](), _latents(16))


def diffusers_dit() -> Subject:
    """DiTTransformer2DModel of the size of DiT-S/2, 12 blocks, latents of 256 pixel images."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=12, sample_size=32
    )
    return Subject(model, _latents(2), lambda result: result.sample)


def diffusers_autoencoder() -> Subject:
    """AutoencoderKL with the widths of Stable Diffusion's halved, 64 pixel images."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(64, 128, 256, 256),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    return Subject(model, (torch.randn(1, 3, 64, 64),), lambda result: result.sample)


SUBJECTS = {
    "DiT-S/2 block, B = 8": block,
    "vqkernels DiT-S/2, B = 2": own_dit,
    "diffusers DiT-S/2, B = 2": diffusers_dit,
    "diffusers AutoencoderKL": diffusers_autoencoder,
}
GPU_SUBJECTS = SUBJECTS | {"vqkernels DiT-XL/2, B = 16": large_dit}


def _latents(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 4, 32, 32), torch.randint(1000, (batch,)), torch.randint(1000, (batch,))


def _randomize(model: nn.Module) -> None:
    """Gates and output layers start at zero, which would make half of the model idle."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def saved_bytes(subject: Subject) -> int:
    """Memory that autograd keeps between forward and backward, every storage once, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in subject.model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = subject()
    del output
    return sum(storages.values())


def step(subject: Subject) -> None:
    """Forward and backward of a mean squared output."""
    subject.model.zero_grad()
    subject().square().mean().backward()


@torch.no_grad()
def forward(subject: Subject) -> Tensor:
    return subject()


def measure(prepare: Callable[[], Subject], name: str, device: torch.device) -> dict[str, Any]:
    """Seconds and bytes of the original, the fused and the compiled model, and how far their outputs differ."""
    torch.manual_seed(0)
    original = prepare()
    _randomize(original.model)
    original = original.on(device)
    fused = original._replace(model=copy.deepcopy(original.model))
    vqkernels.fuse(fused.model, verbose=False)
    compiled = original._replace(model=torch.compile(copy.deepcopy(original.model)))
    expected, actual = forward(original), forward(fused)
    work: dict[str, tuple[Callable[[Subject], Any], Subject]] = {
        "forward": (forward, original),
        "forward fused": (forward, fused),
        "step": (step, original),
        "step fused": (step, fused),
        "step compiled": (step, compiled),
    }
    for run, subject in work.values():
        run(subject)
    seconds: dict[str, list[float]] = {key: [] for key in work}
    for _ in range(ROUNDS):
        for key, (run, subject) in work.items():
            seconds[key].append(seconds_of(lambda: run(subject), device)[0])  # noqa: B023
    return {
        "model": name,
        "difference": ((actual - expected).abs().max() / expected.abs().max()).item(),
        "seconds": seconds,
        "saved_bytes": {"original": saved_bytes(original), "fused": saved_bytes(fused)},
    }


def cells(record: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    ms = {key: 1000 * min(values) for key, values in record["seconds"].items()}
    saved = [record["saved_bytes"][key] / 2**20 for key in ("original", "fused")]
    return (
        record["model"],
        *(f"{ms['forward']:.1f}", f"{ms['forward fused']:.1f}", f"{ms['forward'] / ms['forward fused']:.2f}"),
        *(f"{ms['step']:.1f}", f"{ms['step fused']:.1f}", f"{ms['step'] / ms['step fused']:.2f}"),
        f"{ms['step compiled'] / ms['step fused']:.2f}",
        *(f"{saved[0]:.1f}", f"{saved[1]:.1f}", f"{saved[0] / saved[1]:.2f}"),
    )


def main(argv: list[str] | None = None) -> None:
    """Prints the table of the models whose names contain all words."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_dit", description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only models whose names contain all of these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    settings = Settings(device, 1, ROUNDS, 0.0)
    result: dict[str, Any] = {"provenance": report.provenance(settings), "models": []}
    rows: list[tuple[str, ...]] = [COLUMNS]
    for name, prepare in (GPU_SUBJECTS if device.type == "cuda" else SUBJECTS).items():
        if all(word.lower() in name.lower() for word in arguments.words):
            result["models"].append(measure(prepare, name, device))
            rows.append(cells(result["models"][-1]))
            if arguments.out:
                report.write_json(result, arguments.out)
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        aligned = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *aligned]))


if __name__ == "__main__":
    main()
