"""What memory safety needs of a direct torch.ops call; public functions have explained what is wrong before."""

import torch
from torch import Tensor

from vqkernels.reference._checks import check_device, check_shape, check_tensor


def check_base(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], layout: str) -> None:
    """Checks a tensor of three axes, as `layout` names them to the reader, with at least one column."""
    check_tensor(name, value, dtypes)
    if value.ndim != 3 or value.shape[2] == 0:
        raise ValueError(f"{name}: expected shape {layout} with D at least 1, got {list(value.shape)}")


def check_like(
    name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], like_name: str, like: Tensor
) -> None:
    """Checks that a tensor has the shape that follows from another, and is on its device."""
    check_tensor(name, value, dtypes)
    check_shape(name, value, shape, like_name, like)
    check_device(name, value, like_name, like)
