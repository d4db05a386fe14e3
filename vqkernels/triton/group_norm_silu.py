"""Group normalisation, its affine map and SiLU, and the gradient: the formulas of csrc/cpu/group_norm_silu.h."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.reference._checks import FLOAT_TYPES, check_tensor
from vqkernels.reference._memory_formats import dense_like
from vqkernels.triton._checks import check_like
from vqkernels.triton.group_norm_silu_kernels import (
    group_gradients_kernel,
    input_gradient_kernel,
    moments_kernel,
    normalize_kernel,
    parameter_gradients_kernel,
    statistics_kernel,
    sums_kernel,
)

_TILE = 4096  # elements
_LONGEST_ROW = 1024
_MAX_PARTS = 64  # of the positions of a channel
_BLOCK = 512  # sums of parts that are added at a time
_BLOCK_CHANNELS = 32


class _Problem(NamedTuple):
    """Arguments as the kernels take them."""

    x: Tensor  # dense, in one of the two layouts
    weight: Tensor | None  # contiguous, in the type of the arithmetic
    bias: Tensor | None
    result: Tensor  # fresh, like x
    wide: torch.dtype
    batch: int
    channels: int
    positions: int
    groups: int
    part_size: int
    parts: int
    tile: dict[str, bool | int]

    def programs(self, blocks: int) -> tuple[int]:
        """Of a kernel that shares the positions out among `blocks`."""
        return (self.batch * blocks * triton.cdiv(self.channels, self.tile["BLOCK_CHANNELS"]),)

    def blocks(self) -> int:
        return triton.cdiv(self.positions, self.tile["BLOCK_POSITIONS"])


def _problem(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, activation: str) -> _Problem:
    check_tensor("x", x, FLOAT_TYPES)
    if x.ndim < 2 or groups < 1 or x.shape[1] == 0 or x.shape[1] % groups:
        raise ValueError(f"x: expected shape [B, C, ...] with C divisible by {groups}, got {list(x.shape)}")
    torch._check(activation in ("silu", "none"), lambda: f"vqkernels: unknown activation {activation}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, channels = x.shape[:2]
    positions = x.shape[2:].numel()
    affine = []
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_like(name, value, FLOAT_TYPES, (channels,), "x", x)
            value = value.to(wide).contiguous()
        affine.append(value)
    result = dense_like(x)
    channels_last = positions == 1 or not result.is_contiguous()
    row = min(
        triton.next_power_of_2(channels if channels_last else max(positions, 1)), 64 if channels_last else _LONGEST_ROW
    )
    column = min(triton.next_power_of_2(max(positions, 1) if channels_last else channels), _TILE // row)
    block_channels, block_positions = (row, column) if channels_last else (column, row)
    part_size = triton.cdiv(triton.cdiv(max(positions, 1), _MAX_PARTS), block_positions) * block_positions
    return _Problem(
        x=_arranged(x, result),
        weight=affine[0],
        bias=affine[1],
        result=result,
        wide=wide,
        batch=batch,
        channels=channels,
        positions=positions,
        groups=groups,
        part_size=part_size,
        parts=triton.cdiv(positions, part_size),
        tile={
            "CHANNELS_LAST": channels_last,
            "BLOCK_CHANNELS": block_channels,
            "BLOCK_POSITIONS": block_positions,
        },
    )


def _arranged(x: Tensor, like: Tensor) -> Tensor:
    """The values of x with the strides of `like`."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, like x [B, C, ...], and mean and rstd [B, G] in float32 (float64 for float64)."""
    p = _problem(x, num_groups, weight, bias, activation)
    statistics = [x.new_zeros((p.batch, p.groups), dtype=p.wide) for _ in range(3)]
    if x.numel() == 0:
        return p.result, statistics[0], statistics[1]
    moments = [x.new_empty((p.batch, p.parts, p.channels), dtype=torch.float64) for _ in range(2)]
    with torch.cuda.device_of(x):
        moments_kernel[p.programs(p.parts)](
            p.x,
            *moments,
            p.channels,
            p.positions,
            p.part_size,
            p.parts,
            WIDE=tl.float64 if p.wide == torch.float64 else tl.float32,
            **p.tile,
        )
        statistics_kernel[(p.batch * p.groups,)](
            *moments, *statistics, p.groups, p.channels, p.positions, p.part_size, p.parts, eps, BLOCK=_BLOCK
        )
        normalize_kernel[p.programs(p.blocks())](
            p.x,
            p.weight,
            p.bias,
            *statistics,
            p.result,
            p.channels,
            p.positions,
            p.groups,
            SILU=activation == "silu",
            **p.tile,
        )
    return p.result, statistics[0], statistics[1]


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, in its dtype, and of weight and bias [C], in float32 (float64 for float64)."""
    if mean.ndim != 2:
        raise ValueError(f"mean: expected shape [B, G], got {list(mean.shape)}")
    p = _problem(x, mean.shape[1], weight, bias, activation)
    check_like("grad", grad, (x.dtype,), x.shape, "x", x)
    for name, value in (("mean", mean), ("rstd", rstd)):
        check_like(name, value, (p.wide,), (p.batch, p.groups), "x", x)
    of_channels = [x.new_zeros(p.channels, dtype=p.wide) for _ in range(2)]
    if x.numel() == 0:
        return p.result, of_channels[0], of_channels[1]
    grad, mean, rstd = _arranged(grad, p.result), mean.contiguous(), rstd.contiguous()
    sums = [x.new_empty((p.batch, p.parts, p.channels), dtype=p.wide) for _ in range(2)]
    of_groups = [torch.empty_like(mean) for _ in range(2)]
    with torch.cuda.device_of(x):
        sums_kernel[p.programs(p.parts)](
            p.x,
            grad,
            p.weight,
            p.bias,
            mean,
            rstd,
            *sums,
            p.channels,
            p.positions,
            p.groups,
            p.part_size,
            p.parts,
            SILU=activation == "silu",
            **p.tile,
        )
        group_gradients_kernel[(p.batch * p.groups,)](
            *sums, p.weight, rstd, *of_groups, p.groups, p.channels, p.positions, p.parts, BLOCK=_BLOCK
        )
        parameter_gradients_kernel[(triton.cdiv(p.channels, _BLOCK_CHANNELS),)](
            *sums,
            rstd,
            *of_channels,
            p.batch,
            p.groups,
            p.channels,
            p.parts,
            BLOCK_ROWS=_BLOCK // _BLOCK_CHANNELS,
            BLOCK_CHANNELS=_BLOCK_CHANNELS,
        )
        input_gradient_kernel[p.programs(p.blocks())](
            p.x,
            grad,
            p.weight,
            p.bias,
            mean,
            rstd,
            *of_groups,
            p.result,
            p.channels,
            p.positions,
            p.groups,
            SILU=activation == "silu",
            **p.tile,
            enable_fp_fusion=False,
        )
    return p.result, of_channels[0], of_channels[1]
