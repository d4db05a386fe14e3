"""Checks of arguments, with exceptions that name the argument, what was expected and what came."""

import torch
from torch import Tensor

FLOAT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER_TYPES = (torch.int64, torch.int32)


def check_sizes(**sizes: object) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected an integer of at least 1, got {size!r}")


def check_numbers(low: float | None = None, high: float | None = None, **values: object) -> None:
    """Checks that values are numbers, and not outside [low, high]."""
    for name, value in values.items():
        if not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
            raise TypeError(f"{name}: expected a number, got {describe(value)}")
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{name}: expected a number {bounds}, got {value!r}")


def check_at_most_one(**options: bool) -> None:
    if sum(options.values()) > 1:
        raise ValueError(f"{', '.join(options)}: expected at most one of them, got {len(options)}")


def check_needs(name: str, given: bool, **needed: object) -> None:
    """Raises for an argument that is given without others that it needs."""
    for other, value in needed.items():
        if given and not value:
            raise ValueError(f"{name}: expected only with {other}, got {other}={value!r}")


def check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor) or value.dtype not in dtypes or value.layout != torch.strided:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected a tensor of {expected}, got {describe(value)}")


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], like_name: str, like: Tensor) -> None:
    if value.shape != shape:
        raise ValueError(
            f"{name}: expected shape {list(shape)} to match {like_name} of shape {list(like.shape)}, "
            f"got {list(value.shape)}"
        )


def check_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} to match {like_name}, got {value.device}")


def overlaps_itself(value: Tensor) -> bool:
    """Whether two elements may share memory, judged by the strides."""
    reach = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def check_input(x: Tensor, layouts: list[str], dim: int, channels: int) -> None:
    """Checks that x has one of the layouts, as written for the reader, and `dim` channels."""
    if x.ndim not in [layout.count(",") + 1 for layout in layouts] or x.shape[channels] != dim:
        raise ValueError(f"x: expected shape {' or '.join(layouts)}, got {list(x.shape)}")


def check_weight(weight: object, cluster_size: Tensor) -> None:
    """Checks a weight of statistics: none, a function, or a tensor [K] or [C, K] like cluster_size."""
    if weight is None or (callable(weight) and not isinstance(weight, Tensor)):
        return
    check_tensor("ema_update_weight", weight, FLOAT_TYPES)
    assert isinstance(weight, Tensor)
    if weight.shape not in (cluster_size.shape, cluster_size.shape[1:]):
        shapes = f"{list(cluster_size.shape[1:])} or {list(cluster_size.shape)}"
        raise ValueError(f"ema_update_weight: expected shape {shapes}, got {list(weight.shape)}")


def check_indices(indices: object) -> None:
    check_tensor("indices", indices, INTEGER_TYPES)


def check_index_range(indices: Tensor, num_codes: int) -> None:
    """Checks for values from -1 to num_codes - 1, where that needs no waiting for a device."""
    if indices.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = (indices < -1) | (indices >= num_codes)
    if outside.any():
        raise IndexError(f"indices: expected values from -1 to {num_codes - 1}, got {indices[outside][0].item()}")


def sequence_mask(x: Tensor, shape: torch.Size, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
    """Checks mask [B, N] and lens [B] of an x whose positions have the shape [B, N], and makes one mask of them."""
    if mask is not None and lens is not None:
        raise ValueError("mask, lens: expected at most one of them, got both")
    name, value = ("mask", mask) if lens is None else ("lens", lens)
    if value is None:
        return None
    if x.ndim != 3:
        raise ValueError(f"{name}: expected only with x of three dimensions, got x of shape {list(x.shape)}")
    check_tensor(name, value, (torch.bool,) if lens is None else INTEGER_TYPES)
    check_shape(name, value, shape if lens is None else shape[:1], "x", x)
    check_device(name, value, "x", x)
    return value if lens is None else torch.arange(shape[1], device=x.device) < value.unsqueeze(-1)


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"{layout}{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 40 else type(value).__name__
