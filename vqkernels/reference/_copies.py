"""Copies of what is about to be overwritten."""

from typing import Any

import torch
from torch import Tensor

# An operation that the compiler takes as it is. It does not store clones for the backward pass but makes them again
# there, of what the original holds by then.
_library = torch.library.Library("vqkernels", "FRAGMENT")
_library.define("own_copy(Tensor x) -> Tensor")
_library.impl("own_copy", torch.clone, "CompositeExplicitAutograd")


class _OwnCopy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ops.vqkernels.own_copy(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def own_copy(x: Tensor) -> Tensor:
    """A copy whose values the backward pass gets, even where the same compiled graph overwrites x."""
    return _OwnCopy.apply(x) if torch.compiler.is_compiling() else x.clone()
