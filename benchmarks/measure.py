"""Measures all providers of one operation at one size: first whether they are right, then interleaved rounds."""

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from benchmarks import limits
from benchmarks.cases import parse_case
from benchmarks.peers import Unavailable
from benchmarks.timing import extra_bytes, seconds_of, settle_allocator
from benchmarks.truth import Check

OURS = "vqkernels"
SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are repeated within a sample
TURN = 50e-3  # seconds of a provider's turn in a round; takes as many samples as fit, at least one
LONG_CALL = 1.0  # seconds; what the caches hold before such a call does not matter
# Compiling takes seconds a size: not for the sweeps.
COMPILED_GROUPS = ("published", "large codebook", "own")


class Operation(NamedTuple):
    """What is measured. `inputs` go to the providers and to `check`; `work` is what `limit` counts.

    `cases` are sizes with `name`, `group`, `smaller()` and `record()`; `parse` reads one from the command line.
    """

    name: str
    cases: Sequence[Any]
    providers: dict[str, Callable[..., Callable[[], Any]]]
    inputs: Callable[[Any, torch.device], tuple[Any, ...]]
    check: Callable[..., Check]
    limit: str  # "fma": float operations, "copy": bytes read and written
    work: Callable[[Any], float]
    parse: Callable[[str], Any] = parse_case


class Settings(NamedTuple):
    """How to measure: `budget` is the seconds after which a slow provider gets fewer rounds."""

    device: torch.device
    threads: int
    rounds: int
    budget: float


class _Runner(NamedTuple):
    run: Callable[[], Any]
    number: int  # calls in a sample
    samples: int  # in a round
    is_long: bool
    rounds: int
    record: dict[str, Any]

    def is_due(self, round_number: int, rounds: int) -> bool:
        """Spreads this provider's rounds evenly over all."""
        return (round_number + 1) * self.rounds // rounds > round_number * self.rounds // rounds

    def take_turn(self, device: torch.device) -> None:
        if not self.is_long:
            self.run()  # brings its data back into the caches, which the provider before it has filled
        for _ in range(self.samples):
            self.record["seconds"].append(seconds_of(self.run, device, self.number)[0])


def measure(
    operation: Operation, case: Any, names: list[str], settings: Settings, advance: Callable[[], None]
) -> dict[str, Any]:
    """The figures of one table. `advance` is called after the first calls and after every round."""
    device = settings.device
    settle_allocator()
    inputs = operation.inputs(case, device)
    check = operation.check(*inputs)
    results, runners = [], []
    for name in names:
        record, runner = _first_calls(operation.providers[name], name, case, inputs, check, settings)
        results.append(record)
        runners += [runner] if runner else []
    advance()

    work = operation.work(case)
    rate, reason = _limit_rate(operation.limit, work, settings)
    with _no_garbage_collection():
        for number in range(settings.rounds):
            turn = number % len(runners)
            for runner in runners[turn:] + runners[:turn]:
                if runner.is_due(number, settings.rounds):
                    runner.take_turn(device)
            # Clocks move on shared machines: the limit is the best of the same minutes.
            rate = max(rate, _limit_rate(operation.limit, work, settings)[0])
            advance()

    ours = min(results[0]["seconds"])
    for record in results:
        if not record["unavailable"]:
            shortest = min(record["seconds"])
            record["min_s"], record["median_s"] = shortest, statistics.median(record["seconds"])
            record["ratio"] = shortest / ours
            record["rate"] = work / shortest
            record["fraction"] = work / shortest / rate if rate else None
    return {
        "operation": operation.name,
        "case": str(case),
        "group": case.group,
        **case.record(),
        "limit": {"kind": operation.limit, "rate": rate or None, "unavailable": reason},
        "work": work,
        "results": results,
    }


def _first_calls(
    prepare: Callable[..., Callable[[], Any]],
    name: str,
    case: Any,
    inputs: tuple[Any, ...],
    check: Check,
    settings: Settings,
) -> tuple[dict[str, Any], _Runner | None]:
    """Checks the result of the first call; the second tells memory, and how often to repeat."""
    record: dict[str, Any] = {"provider": name, "unavailable": None}
    try:
        if name == "torch.compile" and case.group not in COMPILED_GROUPS:
            raise Unavailable("is compiled for the published sizes only")
        run = prepare(*inputs)
        record["check"] = check(run())
    except Unavailable as error:
        return record | {"unavailable": str(error)}, None
    except Exception as error:  # a peer that fails is a figure of the table, not the end of it
        if name == OURS:
            raise
        first_line = str(error).partition("\n")[0]
        return record | {"unavailable": f"failed with {type(error).__name__}: {first_line}"}, None
    estimate = 0.0

    def timed() -> None:
        nonlocal estimate
        estimate = seconds_of(run, settings.device)[0]

    record["extra_bytes"] = extra_bytes(timed, settings.device)
    if not estimate:
        timed()
    number = max(1, math.ceil(SHORTEST_SAMPLE / estimate))
    samples = max(1, int(TURN / (estimate * number)))
    rounds = min(settings.rounds, max(1, int(settings.budget / (estimate * number * samples))))
    record["seconds"] = []
    return record, _Runner(run, number, samples, estimate > LONG_CALL, rounds, record)


def _limit_rate(kind: str, work: float, settings: Settings) -> tuple[float, str | None]:
    """What the machine does a second, or 0 and why that is not known."""
    try:
        if kind == "fma":
            return limits.fma_peak(settings.device, settings.threads), None
        return limits.copy_bandwidth(int(work), settings.device), None
    except limits.LimitUnavailable as error:
        return 0.0, str(error)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
