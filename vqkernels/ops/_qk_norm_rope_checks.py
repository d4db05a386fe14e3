"""Checks of the arguments of `qk_norm_rope`."""

import torch
from torch import Tensor

from vqkernels.ops._checks import check_choice
from vqkernels.reference._checks import FLOAT_TYPES, check_device, check_numbers, check_tensor

NORMS = ("rms", "layer", "l2")
LAYOUTS = ("interleaved", "half")
NUMERICS = ("fp32", "eager")


def check_arguments(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str | None,
    across_heads: bool,
    parameters: dict[str, Tensor | None],
    eps: float,
    layout: str,
    numerics: str,
) -> None:
    for name, x in (("q", q), ("k", k)):
        if name == "k" and x is None:
            continue
        check_tensor(name, x, FLOAT_TYPES)
        assert x is not None
        if x.ndim != 4 or x.shape[2] == 0 or x.shape[3] == 0:
            raise ValueError(f"{name}: expected shape [B, L, H, D] with H and D at least 1, got {list(x.shape)}")
    if k is not None:
        check_device("k", k, "q", q)
        if k.dtype != q.dtype:
            raise TypeError(f"k: expected dtype {q.dtype} to match q, got {k.dtype}")
        length = k.shape[1] if cos is None else q.shape[1]
        if k.shape[:2] != (q.shape[0], length) or k.shape[3] != q.shape[3]:
            raise ValueError(
                f"k: expected shape [{q.shape[0]}, {'S' if cos is None else length}, Hk, {q.shape[3]}] to match q of "
                f"shape {list(q.shape)}, got {list(k.shape)}"
            )
    if norm is not None:
        check_choice("norm", norm, NORMS)
    check_choice("layout", layout, LAYOUTS)
    check_choice("numerics", numerics, NUMERICS)
    check_numbers(low=0, eps=eps)
    if not isinstance(across_heads, bool):
        raise TypeError(f"across_heads: expected True or False, got {across_heads!r}")
    if (cos is None) != (sin is None):
        raise ValueError(f"cos, sin: expected both or neither, got only {'sin' if cos is None else 'cos'}")
    if cos is not None and sin is not None:
        _check_table("cos", cos, q, numerics)
        _check_table("sin", sin, q, numerics)
        if sin.shape[-1] != cos.shape[-1]:
            raise ValueError(f"sin: expected {cos.shape[-1]} pairs to match cos, got {sin.shape[-1]}")
    for name, value in parameters.items():
        x_name = name[0]
        x = q if x_name == "q" else k
        if value is not None and (norm is None or x is None or (name.endswith("bias") and norm != "layer")):
            needs = "k" if x is None else 'norm="layer"' if name.endswith("bias") else "norm"
            raise ValueError(f"{name}: expected None without {needs}, got a value")
        if x is not None:
            _check_parameter(name, value, x_name, x, across_heads)


def _check_parameter(name: str, value: object, x_name: str, x: Tensor, across_heads: bool) -> None:
    if value is None:
        return
    check_tensor(name, value, FLOAT_TYPES)
    assert isinstance(value, Tensor)
    check_device(name, value, x_name, x)
    heads, dim = x.shape[2:]
    flat = (across_heads or heads == 1) and value.shape == (heads * dim,)
    fits = value.ndim <= 2 and all(s in (1, n) for s, n in zip(reversed(value.shape), (dim, heads), strict=False))
    if not (flat or fits):
        expected = f"{[heads * dim]}, " if across_heads else ""
        raise ValueError(
            f"{name}: expected shape {expected}{[dim]}, {[heads, dim]}, {[heads, 1]} or [] to match {x_name} of shape "
            f"{list(x.shape)}, got {list(value.shape)}"
        )


def _check_table(name: str, value: object, q: Tensor, numerics: str) -> None:
    check_tensor(name, value, FLOAT_TYPES)
    assert isinstance(value, Tensor)
    check_device(name, value, "q", q)
    batch, length, _, dim = q.shape
    shape = tuple(value.shape)
    if shape[:-1] not in ((length,), (batch, length), (1, length)) or not 2 <= 2 * shape[-1] <= dim:
        raise ValueError(
            f"{name}: expected shape [{length}, R / 2] or [{batch}, {length}, R / 2], one value a pair of at most "
            f"{dim // 2} pairs, to match q of shape {list(q.shape)}, got {list(shape)}"
        )
    if value.requires_grad:
        raise ValueError(f"{name}: expected a constant, since tables get no gradient, got one that requires it")
    if numerics == "eager" and value.dtype == torch.float64 != q.dtype:
        raise TypeError(f'{name}: expected at most float32 with numerics="eager" and q of {q.dtype}, got float64')
