"""Seconds and memory of one call."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def settle_allocator() -> None:
    """Frees a block of 31 MiB, as any model does sooner or later.

    glibc returns blocks larger than any freed before to the system at once, and its page faults would be measured
    instead of the work; what has been freed raises that bound, to at most 32 MiB.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def seconds_of(run: Callable[[], Any], device: torch.device, number: int = 1) -> tuple[float, Any]:
    """Runs `run()` `number` times; returns the seconds of one and the result of the last."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(number):
            result = run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000 / number, result
    begin = time.perf_counter()
    for _ in range(number):
        result = run()
    return (time.perf_counter() - begin) / number, result


def extra_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """How far `run()` lifts the memory in use above what it is before; None where the system does not tell.

    CPU: the peak of the resident set, which Linux lets a process reset. CUDA: what torch's allocator handed out.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # Freed memory that malloc keeps would be used again without a trace.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status, which counts in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
