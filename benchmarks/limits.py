"""What the machine itself can do, measured while the benchmark runs: multiply-adds and bytes copied a second."""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.timing import seconds_of

SOURCE = Path(__file__).with_name("fma_peak.c")
COMPILE_FLAGS = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]


class LimitUnavailable(RuntimeError):
    """A limit cannot be measured here; the message says why."""


def find_compiler() -> list[str]:
    for name in filter(None, [os.environ.get("CC"), "cc", "gcc", "clang"]):
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    raise LimitUnavailable("no C compiler was found (set CC): the FMA peak is not measured")


@functools.cache
def _cpu_probe() -> ctypes._CFuncPtr:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        command = [*find_compiler(), *COMPILE_FLAGS, str(SOURCE), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise LimitUnavailable(f"{' '.join(command)} failed: {result.stderr}")
        probe = ctypes.CDLL(str(library)).fma_flops
    probe.restype, probe.argtypes = ctypes.c_double, [ctypes.c_long]
    return probe


def _cpu_fma_peak(threads: int, steps: int = 1_000_000, repeats: int = 3) -> float:
    probe = _cpu_probe()
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            flops = sum(pool.map(probe, [steps] * threads))
            best = max(best, flops / (time.perf_counter() - start))
    return best


def _cuda_fma_peak(device: torch.device, steps: int = 4000) -> float:
    try:
        from benchmarks.fma_peak_triton import launch
    except ImportError as error:
        raise LimitUnavailable(f"Triton is not installed ({error}): the FMA peak is not measured") from error
    launch(device, 1)
    seconds, flops = seconds_of(lambda: launch(device, steps), device)
    return flops / seconds


def fma_peak(device: torch.device, threads: int) -> float:
    """Float32 operations a second (a multiply-add is two) of `threads` CPU threads, or of a CUDA device.

    Raises:
        LimitUnavailable: nothing here can compile the probe.
    """
    return _cuda_fma_peak(device) if device.type == "cuda" else _cpu_fma_peak(threads)


def copy_bandwidth(num_bytes: int, device: torch.device) -> float:
    """Bytes a second, read plus written, of a copy that moves `num_bytes` in all (at least 64 KiB), best of five.

    The copy is as large as the operation that it is held against, so that both find their data in the same cache.
    A processor also fetches the lines that a copy overwrites, which work in place does not pay for: an update in place
    can reach about 1.2 of it.
    """
    source = torch.ones(max(num_bytes // 2, 32 * 1024), dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)
    seconds = min(seconds_of(lambda: target.copy_(source), device)[0] for _ in range(5))
    return 2 * source.numel() / seconds
