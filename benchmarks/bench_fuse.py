"""`vqkernels.fuse` on the models of other packages: codes, errors and time before and after, one thread.

Run it as `python -m benchmarks.bench_fuse [words of a model's name]`.
"""

import copy
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

import vqkernels
from benchmarks.fuse_models import SUBJECTS
from benchmarks.fuse_truth import compare_subject

ROUNDS = 7
COLUMNS = ("model", "codes", "differ", "output error", "gradient error", "quantizer ms", "", "x", "forward ms", "", "x")


def timed_methods(model: nn.Module, report: vqkernels.fuse.FusionReport) -> tuple[nn.Module, list[float]]:
    """A model, and the list to which the outermost methods that fuse replaces add their seconds.

    Within a stack nothing is timed, which would keep it from being fused as a whole.
    """
    seconds: list[float] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = method(*args, **kwargs)
            seconds.append(time.perf_counter() - begin)
            return result

        return call

    names = [module.name for module in report.fused]
    for name in names:
        if any(name.startswith(f"{other}.") for other in names):
            continue
        module = model.get_submodule(name)
        recipe = next(r for r in vqkernels.fuse.RECIPES if r.concerns(type(module)))
        for method in recipe.methods:
            module.__dict__[method] = timed(getattr(module, method))
    return model, seconds


def measure(name: str) -> tuple[str, ...]:
    """A line of the table."""
    torch.manual_seed(0)
    small, large = SUBJECTS[name](False), SUBJECTS[name](True)
    evaluation = compare_subject(large, 0)
    training = compare_subject(small, 20) if small.trains else None

    original = large.model.eval()
    fused = copy.deepcopy(original)
    report = vqkernels.fuse(fused, verbose=False)
    whole: list[list[float]] = [[], []]
    parts: list[list[float]] = [[], []]
    timed = [timed_methods(copy.deepcopy(model), report) for model in (original, fused)]
    with torch.no_grad():
        for _ in range(ROUNDS):
            for i, model in enumerate((original, fused)):
                begin = time.perf_counter()
                model(*large.inputs)
                whole[i].append(time.perf_counter() - begin)
                instrumented, seconds = timed[i]
                seconds.clear()
                instrumented(*large.inputs)
                parts[i].append(sum(seconds))
    cells = []
    for before, after in ((parts[0], parts[1]), (whole[0], whole[1])):
        before_ms, after_ms = 1000 * median(before), 1000 * median(after)
        cells += [f"{before_ms:.1f}", f"{after_ms:.1f}", f"{before_ms / after_ms:.1f}"]
    return (
        name,
        str(evaluation.codes + (training.codes if training else 0)),
        str(evaluation.ties + (training.ties if training else 0)),
        f"{max(evaluation.output_error, training.output_error if training else 0.0):.1e}",
        f"{training.gradient_error:.1e}" if training else "-",
        *cells,
    )


def main(words: list[str]) -> None:
    """Prints the table of the models whose names contain all words."""
    torch.set_num_threads(1)
    rows: list[tuple[str, ...]] = [COLUMNS]
    rows += [measure(name) for name in SUBJECTS if all(word.lower() in name.lower() for word in words)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]))


if __name__ == "__main__":
    main(sys.argv[1:])
