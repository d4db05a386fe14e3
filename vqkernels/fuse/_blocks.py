"""What blocks of other people's models are made of, on the fused operations.

Every function stands for a few modules of a block in a row. Where one of these is of another class, is listened to or
changed, or the tensors are none that the operations take, it calls the modules as the original does.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vqkernels.fuse._recipes import is_transparent
from vqkernels.ops import (
    bias_gelu,
    gate_residual,
    gate_residual_norm_modulate,
    geglu,
    group_norm_silu,
    norm_modulate,
    swiglu,
)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def stands_for(*modules: nn.Module) -> bool:
    """Whether a parent may do the work of these modules: nobody listens to or changes their calls."""
    return not torch_module._has_any_global_hook() and is_transparent(*modules)


def takes(*tensors: Tensor | None) -> bool:
    """Whether the operations take these tensors together: plain ones, all of one floating-point dtype but in autocast.

    Subclasses, such as DTensor, have an arithmetic of their own.
    """
    given = [t for t in tensors if t is not None]
    device = given[0].device.type
    return all(
        type(t) in (Tensor, nn.Parameter)
        and t.dtype in _DTYPES
        and t.device.type == device
        and (t.dtype == given[0].dtype or torch.is_autocast_enabled(device))
        for t in given
    ) and device in ("cpu", "cuda")


def _modulates(x: Tensor, *modulations: Tensor | None) -> bool:
    """Whether these are [B, 1, D] where x is [B, L, D]; originals broadcast others too."""
    shape = (x.shape[0], 1, x.shape[2]) if x.ndim == 3 else None
    return all(m is None or m.shape == shape for m in modulations) and takes(x, *modulations)


def _adds(x: Tensor, branch: Tensor, gate: Tensor | None) -> bool:
    return branch.shape == x.shape and takes(x, branch) and _modulates(x, gate)


def _normalization(norm: Any, x: Tensor, *modulations: Tensor | None) -> dict[str, Any] | None:
    """A norm over the last dimension of x as arguments of the operations, which modulate it so; None: they cannot."""
    if type(norm) is not nn.LayerNorm or norm.normalized_shape != x.shape[-1:] or not stands_for(norm):
        return None
    if not takes(x, norm.weight, norm.bias) or not _modulates(x, *modulations):
        return None
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}


def _modulate(y: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    y = y if scale is None else y * (1 + scale)
    return y if shift is None else y + shift


def normalized(norm: Any, x: Tensor, shift: Tensor, scale: Tensor, numerics: str) -> Tensor:
    """norm(x) * (1 + scale) + shift, with shift and scale of shape [B, 1, D]."""
    arguments = _normalization(norm, x, shift, scale)
    if arguments is None:
        return _modulate(norm(x), shift, scale)
    return norm_modulate(x, shift, scale, **arguments, numerics=numerics)


def normalized_twice(
    norm: Any, x: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], numerics: str
) -> tuple[Tensor, Tensor]:
    """Two modulations (shift, scale) of one norm of x."""
    arguments = _normalization(norm, x, *first, *second)
    if arguments is None:
        y = norm(x)
        return _modulate(y, *first), _modulate(y, *second)
    return norm_modulate(x, *first, second=second, **arguments, numerics=numerics)


def residual(x: Tensor, branch: Tensor, gate: Tensor | None, numerics: str) -> Tensor:
    """The stream with a branch: x + gate * branch, with a gate of shape [B, 1, D]."""
    if not _adds(x, branch, gate):
        return (branch if gate is None else gate * branch) + x
    return gate_residual(x, branch, gate, numerics=numerics)


def residual_normalized(
    norm: Any,
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    numerics: str,
) -> tuple[Tensor, Tensor]:
    """The stream with a branch, x + gate * branch, and norm * (1 + scale) + shift of it."""
    arguments = _normalization(norm, x, gate, shift, scale)
    if arguments is None or not _adds(x, branch, gate):
        x = residual(x, branch, gate, numerics)
        return x, _modulate(norm(x), shift, scale)
    x, y = gate_residual_norm_modulate(x, branch, gate, shift, scale, **arguments, numerics=numerics)
    return x, y


def _without_bias(linear: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a linear layer makes of x before its bias, and the bias; all of it and None where they cannot be told."""
    if type(linear) is not nn.Linear or linear.bias is None or not stands_for(linear):
        return linear(x), None
    if not takes(x, linear.weight, linear.bias):
        return linear(x), None
    hidden = F.linear(x, linear.weight)
    return hidden, linear.bias.to(hidden.dtype)


def linear_gelu(linear: Any, x: Tensor, approximate: str) -> Tensor:
    """gelu(linear(x))."""
    hidden, bias = _without_bias(linear, x)
    if not takes(hidden):
        return F.gelu(hidden, approximate=approximate)
    return bias_gelu(hidden, bias, approximate=approximate)


def linear_geglu(linear: Any, x: Tensor) -> Tensor:
    """Of the halves a, b of linear(x), a * gelu(b)."""
    hidden, bias = _without_bias(linear, x)
    if not takes(hidden):
        hidden, gate = hidden.chunk(2, dim=-1)
        return hidden * F.gelu(gate)
    return geglu(hidden, bias=bias, gate="second")


def linear_swiglu(linear: Any, x: Tensor) -> Tensor:
    """Of the halves a, b of linear(x), a * silu(b)."""
    hidden, bias = _without_bias(linear, x)
    if not takes(hidden):
        hidden, gate = hidden.chunk(2, dim=-1)
        return hidden * F.silu(gate)
    return swiglu(hidden, bias=bias, gate="second")


def group_normalized(norm: Any, x: Tensor, activation: Any = None) -> Tensor:
    """activation(norm(x)), or norm(x) alone."""
    known = type(norm) is nn.GroupNorm and stands_for(norm)
    known = known and (activation is None or (type(activation) is nn.SiLU and stands_for(activation)))
    if not known or not takes(x, norm.weight, norm.bias):
        return norm(x) if activation is None else activation(norm(x))
    kind = "none" if activation is None else "silu"
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, activation=kind)
