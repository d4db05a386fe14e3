"""A training step of the quantizer: forward, backward, statistics and EMA update."""

from typing import Any

import pytest
import torch

from benchmarks import cases, peers, truth
from benchmarks.cases import Case
from benchmarks.measure import Operation
from benchmarks.pedantic import parameters, run_benchmark


def inputs(case: Case, device: torch.device) -> tuple[Any, ...]:
    z, codebook = case.data(device)
    return z, codebook, torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(device)


operation = Operation(
    name="vector_quantize",
    cases=cases.TRAINING,
    providers={
        "vqkernels": peers.step_vqkernels,
        "vqkernels.nn": peers.step_vqkernels_layer,
        "torch seam": peers.step_torch,
        "torch.compile": peers.step_compiled,
        "vector-quantize-pytorch": peers.step_vector_quantize_pytorch,
    },
    inputs=inputs,
    check=truth.check_step,
    limit="fma",
    work=lambda case: 2.0 * case.rows * case.codes * case.dim,
)


@pytest.mark.parametrize(("case", "provider"), parameters(operation))
def test_vector_quantize(benchmark: Any, case: Case, provider: str) -> None:
    run_benchmark(benchmark, operation, case, provider)
