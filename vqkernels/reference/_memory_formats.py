"""Where the channels of a tensor [B, C, ...] lie in memory."""

import torch
from torch import Tensor


def has_channels_last(x: Tensor) -> bool:
    """Whether each sample of x [B, C, ...] is dense with its channels innermost, and not as [C, ...] too."""
    if _dense(x.shape[1:], x.stride()[1:]):
        return False
    return _dense((*x.shape[2:], x.shape[1]), (*x.stride()[2:], x.stride(1)))


def dense_like(x: Tensor) -> Tensor:
    """A fresh tensor like x [B, C, ...]: channels-last where x has that order of strides, else contiguous."""
    y = torch.empty_like(x)
    return y if y.is_contiguous() or y.movedim(1, -1).is_contiguous() else x.new_empty(x.shape)


def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
