"""Quantizers that are known and stay as they are: their gradient has a term for every row and code."""

from collections.abc import Callable
from typing import Any

from vqkernels.fuse._recipes import Recipe


def _because(reason: str) -> Callable[[Any], str]:
    return lambda module: reason


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        library="taming",
        class_path="GumbelQuantize",
        methods={},
        refuse=_because("it draws codes with probabilities that get gradients, all rows x codes of them"),
    ),
    Recipe(
        library="SEED-Voken",
        class_path="IndexPropagationQuantize",
        methods={},
        refuse=_because("the softmax over all codes of every row gets a gradient"),
    ),
)
