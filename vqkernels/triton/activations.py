"""The activations of feed-forward layers and their derivatives, and how programs share out rows for them."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.reference._checks import FLOAT_TYPES
from vqkernels.triton._checks import check_base, check_like
from vqkernels.triton.arithmetic import load_as, load_columns, store_columns
from vqkernels.triton.row_sums import OF_ALL, columns_together, finished_sums

SILU, GELU, GELU_TANH = range(3)
_SILU, _GELU = tl.constexpr(SILU), tl.constexpr(GELU)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_LINEAR = tl.constexpr(1.5957691216057307)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.07135481627260025)  # 0.044715 times that

_TILE = 1024  # elements
_PARTIALS = 512  # enough programs to fill a GPU, few enough for partial rows to be cheap
_LEAST_ROWS = 16


@triton.jit
def _sigmoid_parts(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """1 / (1 + e^-x) and 1 / (1 + e^x), each with its relative accuracy where the other is 1."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def _normal(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Cumulative distribution and density of the standard normal distribution."""
    density = tl.exp(-0.5 * x * x) * _DENSITY_AT_0
    if x.dtype == tl.float64:
        cumulative = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
    else:
        # The polynomial of csrc/cpu/lanes_math.h, which keeps the relative accuracy of the lower tail.
        t = tl.abs(x)
        t = tl.where(t > 15.0, 15.0, t)
        s = 1.0 / (t + 2.5)
        v = t * s - 0.444091796875
        p = v * -0.0809965953 - 0.0387822166
        p = p * v + 0.114369787
        p = p * v + 0.121310309
        p = p * v - 0.0990137085
        p = p * v - 0.240852356
        p = p * v + 0.13038756
        p = p * v + 0.510749519
        p = p * v - 0.925544202
        p = p * v + 0.756785333
        tail = p * s * tl.exp(-0.5 * t * t)
        cumulative = tl.where(x < 0, tail, 1.0 - tail)
    return cumulative, density


@triton.jit
def activate(x: tl.tensor, ACTIVATION: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The value and the derivative."""
    if ACTIVATION == _SILU:
        share, rest = _sigmoid_parts(x)
        slope = share * (1.0 + x * rest)
    elif ACTIVATION == _GELU:
        share, density = _normal(x)
        slope = share + x * density
    else:
        # Beyond 32 the derivative is 0 or 1, and what the complement is multiplied by must not overflow.
        inside = tl.where(x > 32.0, 32.0, tl.where(x < -32.0, -32.0, x))
        square = inside * inside
        share, rest = _sigmoid_parts(inside * (square * _CUBIC + _LINEAR))
        slope = share * (1.0 + inside * (square * (3.0 * _CUBIC) + _LINEAR) * rest)
    return x * share, slope


@triton.jit
def row_pointers(x: tl.tensor, row: tl.tensor, length: tl.int64, batch_stride: tl.int64, stride: tl.int64) -> tl.tensor:
    """To rows of x [B, L, D], counted over B and L."""
    return x + row // length * batch_stride + row % length * stride


@triton.jit
def load_biased(
    rows: tl.tensor,
    inside: tl.tensor,
    bias: tl.tensor,  # [dim] or None
    first: tl.int64,
    dim: tl.int64,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Columns from `first` on of rows, and the bias added: [n, COLUMNS]."""
    x = load_columns(rows, inside, first, dim, WIDE, COLUMNS)
    if bias is not None:
        column = first + tl.arange(0, COLUMNS)
        x += load_as(bias + column, column < dim, WIDE)[None, :]
    return x


@triton.jit
def store_rounded(
    rows: tl.tensor, inside: tl.tensor, first: tl.int64, dim: tl.int64, x: tl.tensor, COLUMNS: tl.constexpr
) -> None:
    """`store_columns` from any width."""
    if rows.dtype.element_ty != tl.float64:
        x = x.to(tl.float32)
    store_columns(rows, inside, first, dim, x, COLUMNS)


@triton.jit
def store_sums(partials: tl.tensor, sums: tl.tensor, first: tl.int64, dim: tl.int64, COLUMNS: tl.constexpr) -> None:
    """Stores the sums [n, COLUMNS] of a program over its rows as columns from `first` on of a partial row."""
    column = first + tl.arange(0, COLUMNS)
    tl.store(partials + column, tl.sum(sums, axis=0), mask=column < dim)


def tile_of(dim: int) -> dict[str, int]:
    """Rows and columns of the part of a [..., dim] tensor that a program works on at a time."""
    columns = min(triton.next_power_of_2(dim), _TILE)
    return {"ROWS": _TILE // columns, "COLUMNS": columns}


def rows_of_program(rows: int) -> int:
    """How many rows a program of a backward pass adds up; they make one partial row."""
    return max(triton.cdiv(rows, _PARTIALS), _LEAST_ROWS)


class Arguments(NamedTuple):
    """Checked arguments of an operation on x [B, L, D]."""

    x: Tensor  # columns side by side
    bias: Tensor | None  # contiguous
    dtype: torch.dtype  # of the result
    wide: torch.dtype  # of the arithmetic

    @property
    def rows(self) -> int:
        return self.x.shape[0] * self.x.shape[1]


def arguments_of(x: Tensor, bias: Tensor | None) -> Arguments:
    check_base("x", x, FLOAT_TYPES, "[B, L, D]")
    if bias is not None:
        check_like("bias", bias, FLOAT_TYPES, x.shape[2:], "x", x)
        bias = bias.contiguous()
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    return Arguments(columns_together(x), bias, dtype, torch.float64 if dtype == torch.float64 else torch.float32)


def empty_partials(a: Arguments, bias_gradient: bool) -> Tensor | None:
    """Where the programs of a backward pass put partial rows of the gradient of the bias."""
    torch._check(a.bias is not None or not bias_gradient, lambda: "vqkernels: expected a bias whose gradient is wanted")
    if not bias_gradient:
        return None
    return a.x.new_empty((triton.cdiv(a.rows, rows_of_program(a.rows)), a.x.shape[2]), dtype=a.wide)


def bias_gradient_of(a: Arguments, partials: Tensor | None) -> Tensor:
    dtype = a.x.dtype if a.bias is None else a.bias.dtype
    if partials is None:
        return a.x.new_empty(0, dtype=dtype)
    return finished_sums(a.x, partials, OF_ALL, dtype).reshape(-1)


def gelu_of(approximate: str) -> int:
    torch._check(approximate in ("tanh", "none"), lambda: f"vqkernels: unknown approximation {approximate}")
    return GELU_TANH if approximate == "tanh" else GELU


def triton_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
