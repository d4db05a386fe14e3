"""Which implementation serves a call: the torch library of this package, its backends, and why one may be missing."""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

try:
    from vqkernels import _C  # loading it registers the native kernels with torch
except ImportError as error:
    raise ImportError(
        f"the native library of vqkernels cannot be loaded from {Path(__file__).parents[1]}: {error}. In a source tree "
        "build it with `pip install -e .`; to use an installed vqkernels, run from another folder."
    ) from error

BACKENDS = ("native", "triton", "reference")

library = torch.library.Library("vqkernels", "DEF")

# Operations that no build has CUDA kernels for: Triton serves them there.
without_cuda_kernels: set[str] = set()

_default_backend = os.environ.get("VQKERNELS_BACKEND") or None


def build_info() -> dict[str, str]:
    """What the native library was built with.

    Returns:
        `compiler`, `torch` (version), `cuda` (version, empty: built without CUDA kernels), `cuda_architectures`.
    """
    return _C.build_info()


def define(schema: str, shape_rule: Callable[..., Any], *, cuda_kernels: bool = True) -> None:
    """Defines an operation of `torch.ops.vqkernels` with its rule for fake (meta) tensors.

    Arguments that the schema declares as mutated get their version counters bumped. Where the native library has no
    CUDA kernels, and for operations that have none in any build (`cuda_kernels=False`), the Triton function of the
    same name serves CUDA tensors.
    """
    name = schema.split("(")[0]
    library.define(schema)
    torch.library.register_fake(f"vqkernels::{name}", shape_rule, lib=library)
    overload = getattr(torch.ops.vqkernels, name).default
    mutated = [i for i, a in enumerate(overload._schema.arguments) if a.alias_info and a.alias_info.is_write]
    if mutated:
        library.impl(name, _bump_versions(overload, mutated), "ADInplaceOrView", with_keyset=True)
    if not cuda_kernels:
        without_cuda_kernels.add(name)
        library.impl(name, lambda *args: triton_function(name)(*args), "CUDA")
    elif not build_info()["cuda"]:
        library.impl(name, _triton_instead(name), "CUDA")


@functools.cache
def _warn_of_triton() -> None:
    reason = why_unavailable("native", "cuda")
    warnings.warn(f"vqkernels: Triton kernels serve CUDA tensors, because {reason}", stacklevel=3)


def _triton_instead(name: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        _warn_of_triton()
        return triton_function(name)(*args)

    return kernel


def _bump_versions(overload: Any, mutated: list[int]) -> Callable[..., Any]:
    def kernel(keyset: Any, *args: Any) -> Any:
        torch.autograd.graph.increment_version([args[i] for i in mutated])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return kernel


def triton_function(name: str) -> Callable[..., Any]:
    """The Triton implementation of `torch.ops.vqkernels.<name>`, with the same arguments and results."""
    file = "residual_quantize" if name == "residual_statistics" else name.removesuffix("_").removesuffix("_backward")
    return getattr(importlib.import_module(f"vqkernels.triton.{file}"), name)


def why_unavailable(backend: str, device_type: str, *, cuda_kernels: bool = True) -> str | None:
    """Why `backend` cannot serve tensors of `device_type` here; None where it can."""
    if backend == "reference":
        return None
    if backend == "native":
        if device_type == "cuda" and not cuda_kernels:
            return "this operation has no native CUDA kernels; Triton serves it there"
        if device_type == "cpu" or (device_type == "cuda" and build_info()["cuda"]):
            return None
        if device_type == "cuda":
            return "the native library was built without CUDA kernels (no nvcc, or VQKERNELS_CPU_ONLY)"
        return f"there are no native kernels for {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton runs on cuda, or on {device_type} in its interpreter (TRITON_INTERPRET=1, set before import)"


def resolve(backend: str | None, tensor: torch.Tensor, *, cuda_kernels: bool = True) -> str | None:
    """The backend that serves a call on `tensor`; None: whatever is registered for its device.

    `cuda_kernels` is False for operations that no native library has CUDA kernels for.

    Raises:
        ValueError: the backend has no such name.
        RuntimeError: it cannot serve this device; the message says why.
    """
    backend = _default_backend if backend is None else backend
    device_type = tensor.device.type
    if backend is None:
        if device_type in ("cpu", "cuda", "meta"):
            return None
        raise RuntimeError(f'no kernels for device "{device_type}"; backend="reference" runs there')
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = why_unavailable(backend, device_type, cuda_kernels=cuda_kernels)
    if reason is not None:
        raise RuntimeError(f'backend="{backend}" cannot serve this call: {reason}')
    return backend


def implementation(name: str, backend: str | None) -> Callable[..., Any]:
    """What to call for `torch.ops.vqkernels.<name>` under a backend from `resolve` other than "reference"."""
    return triton_function(name) if backend == "triton" else getattr(torch.ops.vqkernels, name)
