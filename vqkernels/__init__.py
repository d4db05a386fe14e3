"""Fused, exact and deterministic kernels for vector quantization and denoising attention in PyTorch.

The functional API is here, layers are in `vqkernels.nn`, models in `vqkernels.models`, and `vqkernels.reference`
holds the same operations and layers in plain PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vqkernels._version import __version__
from vqkernels.ops import (
    ResidualQuantizeResult,
    VectorQuantizeResult,
    attention,
    bias_gelu,
    build_info,
    code_statistics,
    ema_update_,
    gate_residual,
    gate_residual_norm_modulate,
    geglu,
    group_norm_silu,
    guided_step,
    nearest_code,
    norm_modulate,
    qk_norm_rope,
    residual_quantize,
    rope_tables,
    swiglu,
    timestep_embedding,
    topk_codes,
    vector_quantize,
)

__all__ = [
    "ResidualQuantizeResult",
    "VectorQuantizeResult",
    "__version__",
    "attention",
    "bias_gelu",
    "build_info",
    "code_statistics",
    "ema_update_",
    "gate_residual",
    "gate_residual_norm_modulate",
    "geglu",
    "group_norm_silu",
    "guided_step",
    "nearest_code",
    "norm_modulate",
    "qk_norm_rope",
    "residual_quantize",
    "rope_tables",
    "swiglu",
    "timestep_embedding",
    "topk_codes",
    "vector_quantize",
]


if TYPE_CHECKING:
    from vqkernels.fuse import fuse as fuse
    from vqkernels.fuse import unfuse as unfuse


def __getattr__(name: str) -> Any:
    if name in ("fuse", "models", "nn"):  # the package fuse can be called as the function
        return importlib.import_module(f"vqkernels.{name}")
    if name == "unfuse":
        return importlib.import_module("vqkernels.fuse").unfuse
    raise AttributeError(f"module 'vqkernels' has no attribute {name!r}")
