"""`python -m vqkernels sample`: draws digits with a model that `train dit` has trained."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vqkernels.cli import _arguments
from vqkernels.cli.demo import choose_device, require, writable_folder
from vqkernels.training.checkpoint import NAME
from vqkernels.training.data import CLASSES

if TYPE_CHECKING:
    from vqkernels.training.sampling import Known, Start

SIDE = 8


def add_parser(commands: Any) -> None:
    """Adds `sample`."""
    parser = commands.add_parser(
        "sample",
        help="draw digits with a trained diffusion transformer: from noise, from an image, or parts of one",
        description="Draws digits with a checkpoint of `train dit`. --init and --strength begin with an image, noised "
        "as far as the strength says; --init and --mask draw the part of it where the mask is white, around pixels "
        "that stay as they are. Images are white ink on black, are scaled to 8x8 pixels, and come as files that "
        "Pillow reads, whose transparent parts are put on black, or as .npy [8, 8] with values from 0 to 1.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--model", default=f"dit/{NAME}", metavar="FILE", help=f"the checkpoint (default: dit/{NAME})")
    parser.add_argument("--out", default="samples.png", metavar="FILE", help="PNG to write (default: samples.png)")
    parser.add_argument(
        "--npy", metavar="FILE", help="also write the images as an array, float32 [N, 8, 8] from 0 to 1"
    )
    parser.add_argument(
        "--class",
        dest="classes",
        type=_arguments.integer(0, CLASSES - 1),
        nargs="+",
        default=list(range(CLASSES)),
        metavar="DIGIT",
        help="what to draw, one or several of 0 to 9 (default: all)",
    )
    parser.add_argument(
        "--count", type=_arguments.integer(1), default=8, metavar="N", help="images of each class (default: 8)"
    )
    _arguments.add_sampling(parser, "--steps")
    parser.add_argument("--seed", type=_arguments.integer(0, 2**63 - 1), default=0, metavar="N", help="of the noise")
    parser.add_argument("--init", metavar="FILE", help="image to begin with, or to keep parts of")
    parser.add_argument(
        "--strength", type=_arguments.number(0.0, 1.0), metavar="X", help="how much of --init changes, above 0 to 1"
    )
    parser.add_argument("--mask", metavar="FILE", help="image, white where --init is to be drawn anew")
    parser.add_argument("--reference", action="store_true", default=None, help="do not fuse the model: plain PyTorch")
    parser.add_argument("--device", default="auto", help=_arguments.DEVICE)
    parser.add_argument("--threads", type=_arguments.integer(0, 1024), default=0, metavar="N", help=_arguments.THREADS)


def run(arguments: argparse.Namespace) -> None:
    """Draws and writes the PNG, and the array if it is asked for.

    Raises:
        argparse.ArgumentError: an argument cannot be used.
        SystemExit: a package is missing or a file cannot be read; the message says so.
    """
    require("matplotlib", "numpy", "rich", command="sample command", extra="train")
    import numpy as np

    from vqkernels.cli._grid import draw_grid
    from vqkernels.training.sampling import DiTSampler

    device = choose_device(arguments.device)
    outputs = [Path(name) for name in (arguments.out, arguments.npy) if name]
    for path in outputs:
        writable_folder(str(path.parent))
        if path.is_dir():
            raise argparse.ArgumentError(None, f"argument --out, --npy: expected names of files, got {str(path)!r}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    start, known = _given_images(arguments)
    try:
        sampler = DiTSampler.load(arguments.model, device=device, reference=arguments.reference)
    except OSError as error:
        raise SystemExit(f"--model {arguments.model!r}: {error.strerror or error}") from None
    except ValueError as error:
        raise SystemExit(f"--model {error}") from None
    labels = torch.tensor(arguments.classes).repeat_interleave(arguments.count)
    with _arguments.progress_bar("drawing", arguments.steps) as report:
        try:
            images = sampler.draw(
                labels,
                method=arguments.method,
                steps=arguments.steps,
                guidance=arguments.guidance,
                seed=arguments.seed,
                start=start,
                known=known,
                report=report,
            ).cpu()
        except ValueError as error:
            raise argparse.ArgumentError(None, f"argument --{error}") from None
    rows = [(str(label), images[i * arguments.count :][: arguments.count]) for i, label in enumerate(arguments.classes)]
    draw_grid(outputs[0], rows)
    if arguments.npy:
        with outputs[1].open("wb") as file:
            np.save(file, images.squeeze(1).numpy())
    print(f"{', '.join(map(str, outputs))} written: {len(images)} images")


def _given_images(arguments: argparse.Namespace) -> "tuple[Start | None, Known | None]":
    """What --init, --strength and --mask say."""
    from vqkernels.training.sampling import Known, Start

    if arguments.init is None:
        for name in ("strength", "mask"):
            if getattr(arguments, name) is not None:
                raise argparse.ArgumentError(None, f"argument --{name}: expected --init too, an image to apply it to")
        return None, None
    if arguments.strength is None and arguments.mask is None:
        raise argparse.ArgumentError(None, "argument --init: expected --strength or --mask too, which say what changes")
    if arguments.strength == 0:
        raise argparse.ArgumentError(None, "argument --strength: expected a number above 0 to 1, got 0")
    image = _read_image(arguments.init, "--init").unflatten(0, (1, SIDE)).unsqueeze(0)
    start = None if arguments.strength is None else Start(image, arguments.strength)
    if arguments.mask is None:
        return start, None
    return start, Known(image, _read_image(arguments.mask, "--mask") < 0.5)


def _read_image(name: str, option: str) -> Tensor:
    """Grey values of a file, float32 [8, 8] from 0 to 1."""
    import numpy as np

    try:
        if name.lower().endswith(".npy"):
            values = np.load(name, allow_pickle=False)
            if values.shape != (SIDE, SIDE) or values.dtype.kind not in "buif":
                raise ValueError(
                    f"expected an array of numbers [{SIDE}, {SIDE}], got {values.dtype} {list(values.shape)}"
                )
            values = values.astype(np.float32)
            if not (values.min() >= 0 and values.max() <= 1):
                raise ValueError(f"expected values from 0 to 1, got {values.min():g} to {values.max():g}")
        else:
            require("PIL", command="sample command", extra="train")
            from PIL import Image

            with Image.open(name) as image:
                if image.mode[0] in "IF":  # Pillow cuts them off at 255
                    raise ValueError(f"expected a picture of at most 8 bits a channel, got mode {image.mode}")
                if "transparency" in image.info or image.mode[-1] in "Aa":
                    ink = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), ink)
                values = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255
    except (EOFError, OSError, ValueError, SyntaxError) as error:
        raise SystemExit(f"{option} {name!r}: {getattr(error, 'strerror', None) or error}") from None
    return torch.from_numpy(values)
