"""The CUDA kernels on the CPU: compiled with the C++ compiler against emulation/, called through ctypes."""

import ctypes
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).resolve().parent / "emulation"

# The order of the enumerations in csrc/types.h.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
METRICS = ("l2", "cosine", "dot")
GRADIENTS = ("straight_through", "rotation", "none")


def compile_kernels(build_dir: Path) -> Path:
    compiler = next(filter(shutil.which, [os.environ.get("CXX") or "c++", "g++", "clang++"]))
    flags = ["-x", "c++", "-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += ["-mfma"] if platform.machine() in ("x86_64", "AMD64") else []
    sources = [*ROOT.glob("csrc/cuda/*.cu"), *EMULATION.glob("*.cu"), *EMULATION.glob("*.cpp")]
    objects = [build_dir / f"{source.stem}.o" for source in sources]

    def run(*command: object) -> None:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(run, compiler, *flags, f"-I{EMULATION}", "-c", source, "-o", out)
            for source, out in zip(sources, objects, strict=True)
        ]
        for job in jobs:
            job.result()
    library = build_dir / "libemulated.so"
    run(compiler, "-shared", *objects, "-o", library)
    return library


def accumulation_type(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


class EmulatedDevice:
    """The operations of csrc/cuda, on contiguous CPU tensors as the bindings hand them to the kernels.

    Outputs are handed over full of garbage.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def configure(self, multiprocessors: int, *, shared_kib: int = 228, descending: bool = False) -> None:
        """shared_kib: shared memory of a processor, 1 KiB of which a block has without asking."""
        self._library.configure(multiprocessors, shared_kib * 1024, int(descending))

    def count_launches(self) -> int:
        """Since the last call."""
        function = self._library.count_launches
        function.restype = ctypes.c_int64
        return function()

    def call(self, name: str, *arguments: Tensor | float | int | str | None) -> None:
        function = self._library[name]
        function.restype = ctypes.c_char_p
        message = function(*map(self._argument, arguments))
        if message is not None:
            raise RuntimeError(message.decode())

    @staticmethod
    def _argument(value: Tensor | float | int | str | None) -> object:
        if isinstance(value, Tensor):
            assert value.is_contiguous()
            return ctypes.c_void_p(value.data_ptr())
        if isinstance(value, str):
            return ctypes.c_char_p(value.encode())
        if isinstance(value, float):
            return ctypes.c_double(value)
        return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)

    @staticmethod
    def _garbage(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=dtype)
        out.view(torch.uint8 if out.ndim else dtype).fill_(0x5A)
        return out

    def nearest_code(self, z: Tensor, codebook: Tensor, metric: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        heads, rows, dim = z.shape
        scores = self._garbage((heads, rows), z.dtype)
        indices = self._garbage((heads, rows), torch.int64)
        types = DTYPES.index(z.dtype), METRICS.index(metric)
        shape = heads, rows, codebook.shape[1], dim
        self.call("nearest_code", z, codebook, mask, *types, *shape, scores, indices)
        return indices, scores

    def code_statistics(self, z: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
        heads, rows, dim = z.shape
        counts = self._garbage((heads, codes), torch.int64)
        sums = self._garbage((heads, codes, dim), accumulation_type(z))
        self.call("code_statistics", z, indices, DTYPES.index(z.dtype), heads, rows, codes, dim, counts, sums)
        return counts, sums

    def ema_update(self, *tensors: Tensor, decay: float, eps: float) -> None:
        self.call("ema_update", *tensors, *tensors[0].shape, decay, eps)

    def vector_quantize(
        self, z: Tensor, codebook: Tensor, indices: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, rows, dim = z.shape
        quantized = self._garbage((heads, rows, dim), z.dtype)
        mse = self._garbage((), accumulation_type(z))
        valid_rows = self._garbage((), torch.int64)
        shape = heads, rows, codebook.shape[1], dim
        self.call(
            "vector_quantize", z, codebook, indices, mask, DTYPES.index(z.dtype), *shape, quantized, mse, valid_rows
        )
        return quantized, mse, valid_rows

    def vector_quantize_backward(
        self,
        grad_quantized: Tensor | None,
        grad_mse: Tensor | None,
        z: Tensor,
        codebook: Tensor,
        indices: Tensor,
        valid_rows: Tensor,
        gradient: str,
    ) -> Tensor:
        heads, rows, dim = z.shape
        grad_z = self._garbage((heads, rows, dim), z.dtype)
        shape = heads, rows, codebook.shape[1], dim
        inputs = grad_quantized, grad_mse, z, codebook, indices, valid_rows
        self.call(
            "vector_quantize_backward",
            *inputs,
            DTYPES.index(z.dtype),
            *shape,
            GRADIENTS.index(gradient),
            grad_z,
        )
        return grad_z

    def residual_quantize(
        self,
        z: Tensor,
        codebooks: Tensor,
        sizes: list[int],
        metric: str,
        mask: Tensor | None = None,
        num_levels: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        heads, rows, dim = z.shape
        quantized = self._garbage((heads, rows, dim), z.dtype)
        found = self._garbage((heads, rows, len(sizes)), torch.int64)
        mse = self._garbage((heads, len(sizes)), accumulation_type(z))
        valid_rows = self._garbage((heads, len(sizes)), torch.int64)
        inputs = z, codebooks, mask, num_levels, indices, DTYPES.index(z.dtype), METRICS.index(metric)
        shape = heads, rows, dim, torch.tensor(sizes), len(sizes)
        self.call("residual_quantize", *inputs, *shape, quantized, found, mse, valid_rows)
        return quantized, found, mse, valid_rows

    def residual_quantize_backward(
        self,
        grad_quantized: Tensor | None,
        grad_mse: Tensor | None,
        z: Tensor,
        codebooks: Tensor,
        sizes: list[int],
        indices: Tensor,
        valid_rows: Tensor,
        gradient: str,
    ) -> Tensor:
        grad_z = self._garbage(tuple(z.shape), z.dtype)
        inputs = grad_quantized, grad_mse, z, codebooks, indices, valid_rows
        types = DTYPES.index(z.dtype), GRADIENTS.index(gradient)
        shape = *z.shape, torch.tensor(sizes), len(sizes)
        self.call("residual_quantize_backward", *inputs, *types, *shape, grad_z)
        return grad_z

    def residual_statistics(
        self, z: Tensor, codebooks: Tensor, sizes: list[int], indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        heads, rows, dim = z.shape
        counts = self._garbage((heads, sum(sizes)), torch.int64)
        sums = self._garbage((heads, sum(sizes), dim), accumulation_type(z))
        shape = heads, rows, dim, torch.tensor(sizes), len(sizes)
        self.call("residual_statistics", z, codebooks, indices, DTYPES.index(z.dtype), *shape, counts, sums)
        return counts, sums

    def topk_codes(
        self, z: Tensor, codebook: Tensor, k: int, metric: str, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        heads, rows, dim = z.shape
        scores = self._garbage((heads, rows, k), z.dtype)
        indices = self._garbage((heads, rows, k), torch.int64)
        types = DTYPES.index(z.dtype), METRICS.index(metric)
        self.call("topk_codes", z, codebook, mask, *types, heads, rows, codebook.shape[1], dim, k, scores, indices)
        return indices, scores


@pytest.fixture(scope="session")
def emulated_device(tmp_path_factory: pytest.TempPathFactory) -> EmulatedDevice:
    return EmulatedDevice(compile_kernels(tmp_path_factory.mktemp("emulation")))


@pytest.fixture
def device(emulated_device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    """The emulated device with two processors, beside the CPU with its scalar kernels."""
    monkeypatch.setenv("VQKERNELS_CPU_CAPABILITY", "scalar")
    emulated_device.configure(2)
    return emulated_device
