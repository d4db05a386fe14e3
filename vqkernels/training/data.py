"""scikit-learn's handwritten digits; needs scikit-learn."""

from typing import NamedTuple

import torch
from torch import Tensor

CLASSES = 10
HELD_OUT = 360


class Labelled(NamedTuple):
    """Images, float32 [N, 1, 8, 8] with values from 0 to 1, and their classes, int64 [N]."""

    images: Tensor
    labels: Tensor


def digits() -> tuple[Labelled, Labelled]:
    """The 1,797 digits as 1,437 for training and 360 held out: a fixed random split with equal shares of the classes.

    The digits are sorted by writer, so that the last ones would be a harder set than those before them.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    content = load_digits()
    parts = train_test_split(
        content.images, content.target, test_size=HELD_OUT, stratify=content.target, random_state=0
    )
    images = [torch.from_numpy(part / 16).float().unsqueeze(1) for part in parts[:2]]
    labels = [torch.from_numpy(part).long() for part in parts[2:]]
    return Labelled(images[0], labels[0]), Labelled(images[1], labels[1])


def one_of_each(data: Labelled) -> Tensor:
    """The first image of every class, [10, 1, 8, 8], in the order of the classes."""
    return torch.stack([data.images[data.labels == label][0] for label in range(CLASSES)])
