"""Residual quantization of rows at all levels: quantized rows and indices."""

from typing import Any

import pytest
import torch

from benchmarks import cases, peers, truth
from benchmarks.cases import Case
from benchmarks.measure import Operation
from benchmarks.pedantic import parameters, run_benchmark


def inputs(case: Case, device: torch.device) -> tuple[Any, ...]:
    z, _ = case.data(device)
    generator = torch.Generator().manual_seed(case.levels)
    codebooks = torch.randn(case.levels, case.codes, case.dim, generator=generator)
    # A level has codes of the size of what the one before leaves over.
    scales = 0.8 ** torch.arange(case.levels)
    return z, (codebooks * scales.reshape(-1, 1, 1)).to(device)


operation = Operation(
    name="residual_quantize",
    cases=cases.RESIDUAL,
    providers={
        "vqkernels": peers.residual_vqkernels,
        "vqkernels by level": peers.residual_vqkernels_levels,
        "torch seam": peers.residual_addmm,
        "torch.compile": peers.residual_compiled,
        "vector-quantize-pytorch": peers.residual_vector_quantize_pytorch,
    },
    inputs=inputs,
    check=truth.check_residual,
    limit="fma",
    work=lambda case: 2.0 * case.rows * case.codes * case.dim * case.levels,
)


@pytest.mark.parametrize(("case", "provider"), parameters(operation))
def test_residual_quantize(benchmark: Any, case: Case, provider: str) -> None:
    run_benchmark(benchmark, operation, case, provider)
