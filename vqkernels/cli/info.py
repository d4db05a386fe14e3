"""`python -m vqkernels info`: the environment, and which backend serves which operation."""

import argparse
import importlib.metadata
import importlib.util
import inspect
import os
import platform

import torch

import vqkernels
from vqkernels import _C, ops
from vqkernels.ops._backend import BACKENDS, why_unavailable, without_cuda_kernels

DEVICE_TYPES = ("cpu", "cuda")


def operations(*, with_backends: bool = True) -> list[str]:
    """The public operations that take a backend, or those without one: plain PyTorch."""
    # An operation lives in a file of its name, other public functions do not.
    functions = {name: getattr(ops, name) for name in ops.__all__}
    return [
        name
        for name, function in functions.items()
        if inspect.isfunction(function)
        and function.__module__ == f"vqkernels.ops.{name.removesuffix('_')}"
        and ("backend" in inspect.signature(function).parameters) == with_backends
    ]


def why_not(operation: str, backend: str, device_type: str) -> str | None:
    """Why `backend` cannot serve `operation` on `device_type` in this process; None where it can."""
    cuda_kernels = operation not in without_cuda_kernels
    reason = why_unavailable(backend, device_type, cuda_kernels=cuda_kernels)
    if reason is not None:
        return reason
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if backend == "triton" and importlib.util.find_spec(f"vqkernels.triton.{operation.removesuffix('_')}") is None:
        return f"there is no Triton kernel of {operation}"
    return None


def environment() -> dict[str, str]:
    """Versions, devices and what the native library was built with."""
    build = vqkernels.build_info()
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    overrides = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("VQKERNELS_")]
    return {
        "vqkernels": vqkernels.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'no'}",
        "Triton": triton,
        "built with": f"torch {build['torch']}, {build['compiler']}",
        "CUDA kernels": f"CUDA {build['cuda']} for {build['cuda_architectures']}" if build["cuda"] else "no",
        "GPUs": ", ".join(gpus) or "none",
        "CPU capability": f"{_C.cpu_capability()} (this machine has {', '.join(_C.cpu_capabilities())})",
        "threads": str(torch.get_num_threads()),
        "set": " ".join(overrides) or "no VQKERNELS_ variable",
    }


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def run(arguments: argparse.Namespace) -> None:
    """Prints the environment and the table operation x backend, with numbered reasons where one is missing."""
    print(aligned([[key, value] for key, value in environment().items()]))
    columns = [(backend, device_type) for device_type in DEVICE_TYPES for backend in BACKENDS]
    rows = [["operation", *(f"{backend}/{device_type}" for backend, device_type in columns)]]
    reasons: dict[str, int] = {}
    for operation in operations():
        cells = [why_not(operation, *column) for column in columns]
        rows.append(
            [
                operation,
                *("yes" if why is None else f"no [{reasons.setdefault(why, len(reasons) + 1)}]" for why in cells),
            ]
        )
    print()
    print(aligned(rows))
    print()
    print(f"plain PyTorch, on every device: {', '.join(operations(with_backends=False))}")
    if reasons:
        print()
        print("\n".join(f"[{number}] {why}" for why, number in reasons.items()))
