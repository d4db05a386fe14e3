"""Statistics of codes: z [N, D], indices [N] -> counts [K], sums [K, D]."""

from typing import Any

import pytest
import torch

import vqkernels
from benchmarks import cases, peers, truth
from benchmarks.cases import Case
from benchmarks.measure import Operation
from benchmarks.pedantic import parameters, run_benchmark


def inputs(case: Case, device: torch.device) -> tuple[Any, ...]:
    z, codebook = case.data(device)
    return z, vqkernels.nearest_code(z, codebook), case.codes


operation = Operation(
    name="code_statistics",
    cases=cases.STATISTICS,
    providers={
        "vqkernels": peers.statistics_vqkernels,
        "index_add": peers.statistics_index_add,
        "torch.compile": peers.statistics_compiled,
        "one-hot product": peers.statistics_one_hot,
    },
    inputs=inputs,
    check=truth.check_statistics,
    limit="copy",
    # rows and indices in, sums and counts out
    work=lambda case: 4.0 * case.dim * (case.rows + case.codes) + 8.0 * (case.rows + case.codes),
)


@pytest.mark.parametrize(("case", "provider"), parameters(operation))
def test_code_statistics(benchmark: Any, case: Case, provider: str) -> None:
    run_benchmark(benchmark, operation, case, provider)
