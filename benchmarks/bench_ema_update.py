"""EMA update: codebook [K, D] and its state move toward counts [K] and sums [K, D]."""

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
    return codebook, *vqkernels.code_statistics(z, vqkernels.nearest_code(z, codebook), case.codes)


operation = Operation(
    name="ema_update",
    cases=cases.CODEBOOKS,
    providers={
        "vqkernels": peers.ema_vqkernels,
        "torch": peers.ema_torch,
        "torch.compile": peers.ema_compiled,
    },
    inputs=inputs,
    check=truth.check_ema,
    limit="copy",
    # sums and code_sum in, code_sum and codebook out; the cluster sizes likewise
    work=lambda case: 4.0 * 4.0 * case.codes * case.dim + 16.0 * case.codes,
)


@pytest.mark.parametrize(("case", "provider"), parameters(operation))
def test_ema_update(benchmark: Any, case: Case, provider: str) -> None:
    run_benchmark(benchmark, operation, case, provider)
