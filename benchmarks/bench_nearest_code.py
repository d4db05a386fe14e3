"""Codebook search: z [N, D], codebook [K, D] -> indices [N]."""

from typing import Any

import pytest
import torch

from benchmarks import cases, peers, truth
from benchmarks.cases import Case
from benchmarks.measure import Operation
from benchmarks.pedantic import parameters, run_benchmark


def inputs(case: Case, device: torch.device) -> tuple[Any, ...]:
    return case.data(device)


operation = Operation(
    name="nearest_code",
    cases=cases.SEARCH,
    providers={
        "vqkernels": peers.search_vqkernels,
        "cdist+argmin": peers.search_cdist,
        "addmm+argmax": peers.search_addmm,
        "torch.compile": peers.search_compiled,
        "faiss": peers.search_faiss,
        "scikit-learn": peers.search_sklearn,
        "vector-quantize-pytorch": peers.search_vector_quantize_pytorch,
        "flash-kmeans": peers.search_flash_kmeans,
    },
    inputs=inputs,
    check=truth.check_search,
    limit="fma",
    work=lambda case: 2.0 * case.rows * case.codes * case.dim,
)


@pytest.mark.parametrize(("case", "provider"), parameters(operation))
def test_nearest_code(benchmark: Any, case: Case, provider: str) -> None:
    run_benchmark(benchmark, operation, case, provider)
