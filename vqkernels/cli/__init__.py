"""The command line, `python -m vqkernels`: `info`, `demo`, `encode`, `train` and `sample`."""

import argparse
import sys
from collections.abc import Sequence

from vqkernels.cli import demo, encode, info, sample, train
from vqkernels.cli._arguments import DEVICE, THREADS, integer


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of what it returns is the command's function."""
    parser = argparse.ArgumentParser(
        prog="python -m vqkernels", description="Fused, deterministic kernels for vector quantization and denoising."
    )
    commands = parser.add_subparsers(title="commands", required=True)

    command = commands.add_parser("info", help="what this installation runs on, and which operation runs where")
    command.set_defaults(run=info.run)

    command = commands.add_parser(
        "demo",
        help="train a VQ-VAE on handwritten digits, with the reference and with the fused kernels",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.set_defaults(run=demo.run)
    command.add_argument("--device", default="auto", help=DEVICE)
    command.add_argument("--steps", type=integer(1), default=400, help="training steps of each model")
    command.add_argument("--batch-size", type=integer(1), default=256, help="images in a step")
    command.add_argument(
        "--images",
        type=integer(demo.FEWEST_IMAGES, demo.MOST_IMAGES),
        default=demo.MOST_IMAGES,
        help=f"images to use, at least {demo.FEWEST_IMAGES}, a sixth of them held out",
    )
    command.add_argument("--codes", type=integer(2), default=512, help="codes in the codebook")
    command.add_argument("--seed", type=integer(0, 2**31 - 1), default=0, help="of weights, batches and revived codes")
    command.add_argument("--threads", type=integer(0, 1024), default=0, help=THREADS)
    command.add_argument("--out", default="demo", help="folder for demo.png, metrics.json and model.pt")

    command = commands.add_parser(
        "encode",
        help="replace a folder of images or audio by its codes; under torchrun with several processes",
        description=encode.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=encode.run)
    command.add_argument("--data", required=True, help="folder of images, or of audio: .wav, .npy or .npz")
    command.add_argument("--out", required=True, help="folder for the codes; what it holds of this model is kept")
    command.add_argument("--model", help="file written by the demo or by vqkernels.models.save_checkpoint")
    command.add_argument("--device", default="auto", help=DEVICE)
    command.add_argument("--threads", type=integer(0, 1024), default=0, help=THREADS)
    command.add_argument("--overwrite", action="store_true", help="encode everything again, also for another model")

    train.add_parser(commands)
    sample.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0, 1 where `encode` could not read a file, or 128 plus the number of the signal that has stopped
            the command.

    Raises:
        SystemExit: with 2 for bad arguments, with a message (exit code 1) where the command cannot run.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except argparse.ArgumentError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted: nothing more is written", file=sys.stderr)
        return 130
