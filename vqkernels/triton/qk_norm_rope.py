"""Normalisation and rotation of queries and keys, and their gradients: launches of qk_norm_rope_kernels.py."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqkernels.reference._checks import FLOAT_TYPES, check_device, check_shape, check_tensor
from vqkernels.triton._checks import check_like
from vqkernels.triton.qk_norm_rope_kernels import norm_rope_backward_kernel, norm_rope_kernel

# Numbers of x that a program holds at a time, where the norm leaves a choice.
_TILE = 2048

# Programs at most among which positions are divided where they are summed over.
_PROGRAMS = 1024


class _Inputs(NamedTuple):
    """Checked arguments as the kernels take them."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    factor: Tensor | None
    table_strides: tuple[int, int]
    head_blocks: int
    constants: dict[str, object]


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _inputs(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    factor: Tensor | None,
    norm: str,
    across_heads: bool,
    eps: float,
    layout: str,
) -> _Inputs:
    check_tensor("x", x, FLOAT_TYPES)
    if x.ndim != 4 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"x: expected shape [B, L, H, D] with H and D at least 1, got {list(x.shape)}")
    batch, length, heads, dim = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            shared = parameter.ndim == 2 and parameter.shape[0] == 1
            check_like(name, parameter, (wide,), (1 if shared else heads, dim), "x", x)
    if weight is not None and bias is not None and weight.shape != bias.shape:
        weight, bias = weight.expand(heads, dim), bias.expand(heads, dim)
    torch._check(norm in ("none", "rms", "layer", "l2"), lambda: f"vqkernels: unknown norm {norm}")
    torch._check(layout in ("interleaved", "half"), lambda: f"vqkernels: unknown layout {layout}")
    torch._check((cos is None) == (sin is None), lambda: "vqkernels: expected cos and sin, or neither")
    table_strides = 0, 0
    pairs = dim // 2
    if cos is not None and sin is not None:
        pairs = cos.shape[-1]
        torch._check(2 * pairs <= dim, lambda: f"vqkernels: expected at most {dim // 2} pairs, got {pairs}")
        for name, table in (("cos", cos), ("sin", sin)):
            shared = table.ndim == 3 and table.shape[0] == 1
            check_like(name, table, (wide,), (1 if shared else batch, length, pairs), "x", x)
        check_shape("sin", sin, tuple(cos.shape), "cos", cos)
        cos, sin = _dense_rows(cos), _dense_rows(sin)
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        table_strides = 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1)
    if factor is not None:
        torch._check(norm in ("rms", "l2"), lambda: f"vqkernels: expected no factor with norm {norm}")
        check_like("factor", factor, (wide,), (batch, length, 1 if across_heads else heads, 1), "x", x)
        factor = factor.contiguous()
    block, rest = triton.next_power_of_2(max(pairs, 1)), dim - 2 * pairs
    rest_block = triton.next_power_of_2(max(rest, 1))
    heads_block = triton.next_power_of_2(heads)
    if not across_heads:
        heads_block = min(heads_block, max(1, _TILE // (2 * block + rest_block)))
    return _Inputs(
        x=_dense_rows(x),
        weight=None if weight is None else weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        cos=cos,
        sin=sin,
        factor=factor,
        table_strides=table_strides,
        head_blocks=triton.cdiv(heads, heads_block),
        constants={
            "PAIRS": pairs,
            "REST": rest,
            "EPS": eps,
            "NORM": norm,
            "ACROSS": across_heads,
            # Without a rotation any two numbers are a pair: those that are loaded most easily.
            "INTERLEAVED": layout == "interleaved" and cos is not None,
            "HEADS": heads_block,
            "BLOCK": block,
            "REST_BLOCK": rest_block,
            "dtype": tl.float64 if wide == torch.float64 else tl.float32,
            "num_warps": 4 if heads_block * block <= 2048 else 8,
            "enable_fp_fusion": False,  # products are rounded before they are added up, as on a CPU
        },
    )


def _output(x: Tensor) -> tuple[Tensor, Tensor]:
    """What is returned, ordered like x, and what a kernel writes: the same where its rows are dense."""
    out = torch.empty_like(x)
    return out, out if out.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def qk_norm_rope(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    factor: Tensor | None,
    norm: str,
    across_heads: bool,
    eps: float,
    layout: str,
) -> Tensor:
    """Normalises and rotates x [B, L, H, D].

    weight and bias [1 or H, D], cos and sin [1 or B, L, R / 2] and factor [B, L, H or (across heads) 1, 1] are of
    float32 (float64 for float64). With `factor` the roundings are those of torch's expression.
    """
    inputs = _inputs(x, weight, bias, cos, sin, factor, norm, across_heads, eps, layout)
    batch, length, heads, dim = x.shape
    out, target = _output(x)
    if x.numel() == 0:
        return out
    parameter = inputs.bias if inputs.weight is None else inputs.weight
    with torch.cuda.device_of(x):
        norm_rope_kernel[(batch * length, inputs.head_blocks)](
            inputs.x,
            inputs.weight,
            inputs.bias,
            inputs.cos,
            inputs.sin,
            inputs.factor,
            target,
            length,
            heads,
            *inputs.x.stride()[:3],
            *target.stride()[:3],
            *inputs.table_strides,
            PARAMETER_STRIDE=0 if parameter is None or parameter.shape[0] == 1 else dim,
            **inputs.constants,
        )
    return out if target is out else out.copy_(target)


def qk_norm_rope_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    across_heads: bool,
    eps: float,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias ([0, 0] without), from that of the result of `qk_norm_rope`."""
    inputs = _inputs(x, weight, bias, cos, sin, None, norm, across_heads, eps, layout)
    check_tensor("grad", grad, (x.dtype,))
    check_shape("grad", grad, tuple(x.shape), "x", x)
    check_device("grad", grad, "x", x)
    batch, length, heads, dim = x.shape
    rows = batch * length
    out, target = _output(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # A program sums over consecutive positions, the partial sums are added up in float64.
    programs = rows if weight is None and bias is None else min(rows, max(1, _PROGRAMS // inputs.head_blocks))
    rows_of_program = triton.cdiv(rows, max(programs, 1))
    programs = triton.cdiv(rows, max(rows_of_program, 1))

    def partial_sums(parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        return x.new_empty((programs, inputs.head_blocks if parameter.shape[0] == 1 else heads, dim), dtype=wide)

    weight_sums, bias_sums = partial_sums(inputs.weight), partial_sums(inputs.bias)
    grad = _dense_rows(grad)
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            norm_rope_backward_kernel[(programs, inputs.head_blocks)](
                grad,
                inputs.x,
                inputs.weight,
                inputs.cos,
                inputs.sin,
                target,
                weight_sums,
                bias_sums,
                rows,
                rows_of_program,
                length,
                heads,
                *grad.stride()[:3],
                *inputs.x.stride()[:3],
                *target.stride()[:3],
                *inputs.table_strides,
                SHARED_WEIGHT=inputs.weight is not None and inputs.weight.shape[0] == 1,
                SHARED_BIAS=inputs.bias is not None and inputs.bias.shape[0] == 1,
                **inputs.constants,
            )
        out = out if target is out else out.copy_(target)

    def summed(parameter: Tensor | None, sums: Tensor | None) -> Tensor:
        if parameter is None or sums is None:
            return x.new_empty((0, 0), dtype=wide)
        total = sums.sum(0, dtype=torch.float64)
        return total.sum_to_size(parameter.shape).to(wide)

    return out, summed(weight, weight_sums), summed(bias, bias_sums)
