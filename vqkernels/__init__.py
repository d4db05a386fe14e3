"""Fused, exact and deterministic kernels for vector quantization in PyTorch.

The functional API is here, layers are in `vqkernels.nn`, models in `vqkernels.models`, and `vqkernels.reference`
holds the same operations and layers in plain PyTorch.
"""

import importlib
from types import ModuleType

from vqkernels._version import __version__
from vqkernels.ops import (
    VectorQuantizeResult,
    build_info,
    code_statistics,
    ema_update_,
    nearest_code,
    vector_quantize,
)

__all__ = [
    "VectorQuantizeResult",
    "__version__",
    "build_info",
    "code_statistics",
    "ema_update_",
    "nearest_code",
    "vector_quantize",
]


def __getattr__(name: str) -> ModuleType:
    if name in ("models", "nn"):
        return importlib.import_module(f"vqkernels.{name}")
    raise AttributeError(f"module 'vqkernels' has no attribute {name!r}")
