"""A training step of a residual quantizer layer: forward, backward, statistics and EMA update of all levels."""

from typing import Any

import pytest
import torch

from benchmarks import bench_residual_quantize, cases, peers, truth
from benchmarks.cases import Case
from benchmarks.measure import Operation
from benchmarks.pedantic import parameters, run_benchmark


def inputs(case: Case, device: torch.device) -> tuple[Any, ...]:
    z, codebooks = bench_residual_quantize.inputs(case, device)
    return z, codebooks, torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(device)


operation = Operation(
    name="residual_vq",
    cases=cases.RESIDUAL_TRAINING,
    providers={
        "vqkernels": peers.residual_step_vqkernels,
        "vector-quantize-pytorch": peers.residual_step_vector_quantize_pytorch,
    },
    inputs=inputs,
    check=truth.check_residual_step,
    limit="fma",
    work=lambda case: 2.0 * case.rows * case.codes * case.dim * case.levels,
)


@pytest.mark.parametrize(("case", "provider"), parameters(operation))
def test_residual_vq(benchmark: Any, case: Case, provider: str) -> None:
    run_benchmark(benchmark, operation, case, provider)
