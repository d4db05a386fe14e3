"""The operations under pytest-benchmark: `pytest benchmarks/bench_*.py`."""

from typing import Any

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.measure import OURS, Operation
from benchmarks.peers import Unavailable

CPU = torch.device("cpu")


def available(operation: Operation, device: torch.device) -> dict[str, str | None]:
    """Every provider of an operation, with the reason where it does not serve a small case on this device."""
    reasons: dict[str, str | None] = {}
    inputs = operation.inputs(operation.cases[0].smaller(), device)
    for name, prepare in operation.providers.items():
        try:
            prepare(*inputs)
            reasons[name] = None
        except Unavailable as error:
            reasons[name] = str(error)
    return reasons


def parameters(operation: Operation) -> list[Any]:
    """Published cases x providers that are there."""
    names = [name for name, reason in available(operation, CPU).items() if reason is None]
    published = [case for case in operation.cases if case.group == "published"]
    return [pytest.param(case, name, id=f"{case}-{name}") for case in published for name in names]


def run_benchmark(benchmark: Any, operation: Operation, case: Case, provider: str) -> None:
    """Checks the first result, then times a few rounds with one thread. A case that does not fit in memory fails."""
    torch.set_num_threads(1)
    inputs = operation.inputs(case, CPU)
    run = operation.providers[provider](*inputs)
    figures = operation.check(*inputs)(run())
    if provider == OURS:
        assert figures.get("differs", 0) == figures.get("beyond_bound", 0) == 0
    benchmark.group = f"{operation.name} {case}"
    benchmark.extra_info.update(figures)
    benchmark.pedantic(run, rounds=3)
