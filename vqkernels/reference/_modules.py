"""What the layers share that have no codebook to train: layouts, dtypes, autocast."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqkernels.reference import _checks


class FixedDtypeBuffers(nn.Module):
    """A module whose own buffers keep their dtype, whatever the module is converted to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedDtypeBuffers":
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            converted = self._buffers[name]
            if converted is not None and converted.dtype != dtype:
                # From the values as they were: the conversion may have rounded them.
                self._buffers[name] = before[name].to(converted.device)  # type: ignore[union-attr]
        return self


def channels_last(x: object, dim: int, first: bool) -> Tensor:
    """Checks that x is [B, dim, ...] where channels are first, otherwise [B, ..., dim], and moves them to the end."""
    _checks.check_tensor("x", x, _checks.FLOAT_TYPES)
    assert isinstance(x, Tensor)
    if x.ndim < 2 or x.shape[1 if first else -1] != dim:
        layout = f"[B, {dim}, ...]" if first else f"[B, ..., {dim}]"
        raise ValueError(f"x: expected shape {layout}, got {list(x.shape)}")
    return x.movedim(1, -1) if first else x


def without_autocast(x: Tensor, disable: bool = True) -> torch.autocast:
    """A context in which x's device does not autocast, or, if that is not wanted, does as before."""
    device_type = "cpu" if x.is_meta else x.device.type  # meta has no autocast
    return torch.autocast(device_type, enabled=not disable and torch.is_autocast_enabled(device_type))


def project(projection: nn.Module, x: Tensor) -> Tensor:
    """Projects decoded codes in the dtype of the projection's weights."""
    dtype = next((p.dtype for p in projection.parameters()), x.dtype)
    return projection(x.to(dtype))


def pass_gradient(x: Tensor, value: Tensor) -> Tensor:
    """The value, with the gradient of x."""
    return value.detach() + (x - x.detach())
