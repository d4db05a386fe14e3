"""What can be set of a training run; the command line makes an option of every field."""

import dataclasses
from dataclasses import dataclass
from typing import Any


def _option(default: Any, help: str, **limits: Any) -> Any:
    """A field: what its option says, and its `least`, `most` or `choices`."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class TrainingConfig:
    """What every model has in common. With the same values and data a run is the same, bit for bit, on one machine."""

    steps: int = _option(1500, "training steps in all; a resumed run may have more than before", least=1)
    batch_size: int = _option(128, "images in a step", least=1)
    learning_rate: float = _option(2e-3, "of AdamW, reached after the warm-up and kept", least=0.0)
    warmup: int = _option(100, "steps in which the learning rate grows to its value", least=0)
    ema_decay: float = _option(
        0.995, "of the moving average of the weights, which samples are drawn with", least=0.0, most=1.0
    )
    seed: int = _option(0, "of weights, batches and noise", least=0, most=2**31 - 1)
    threads: int = _option(0, "CPU threads; 0: torch's choice", least=0, most=1024)
    reference: bool = _option(False, "do not fuse the model: plain PyTorch")


@dataclass(frozen=True)
class DiTConfig(TrainingConfig):
    """A class-conditional diffusion transformer, trained with classifier-free guidance."""

    prediction: str = _option("flow", "what the model predicts", choices=("epsilon", "v", "x0", "flow"))
    schedule: str = _option("cosine", "of the noise, unless the prediction is flow", choices=("linear", "cosine"))
    learned_sigma: bool = _option(False, "learn the variance of the steps too; not for a flow")
    patch_size: int = _option(2, "side of a patch of the image, or of the map of latents", least=1)
    hidden_size: int = _option(128, "width of the transformer, a multiple of 4", least=4)
    depth: int = _option(4, "blocks", least=1)
    num_heads: int = _option(4, "heads of attention; they divide the width", least=1)
    class_dropout: float = _option(0.1, "share of images trained without their class", least=0.0, most=1.0)
