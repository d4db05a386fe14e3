"""Peak memory with a large codebook: `python -m benchmarks --memory` runs `python -m benchmarks.memory OPERATION`."""

import json
import subprocess
import sys

import torch
from torch import Tensor

import vqkernels
from benchmarks.cases import Case
from benchmarks.peers import DECAY, EPS, CodebookState
from benchmarks.timing import extra_bytes

CASE = Case("", "memory", 65536, 262144, 8)
ALLOWANCE = 64 * 2**20
OPERATIONS = ("nearest_code", "vector_quantize")


def search(z: Tensor, codebook: Tensor) -> list[Tensor]:
    """Returns all inputs and outputs."""
    return [z, codebook, vqkernels.nearest_code(z, codebook)]


def training_step(z: Tensor, codebook: Tensor) -> list[Tensor]:
    """Forward, backward, statistics and EMA update; returns all inputs and outputs."""
    state = CodebookState(codebook, codebook.new_ones(codebook.shape[0]), torch.zeros_like(codebook))
    rows = z.detach().requires_grad_()
    result = vqkernels.vector_quantize(rows, codebook, statistics=True)
    (result.quantized.sum() + result.loss).backward()
    vqkernels.ema_update_(*state, result.counts, result.sums, decay=DECAY, eps=EPS)
    return [z, rows.grad, *state, *result]


def main(operation: str) -> None:
    """Measures in this process, which has to be fresh, and prints {"extra_bytes": ..., "bound_bytes": ...}."""
    run = search if operation == "nearest_code" else training_step
    cpu = torch.device("cpu")
    run(*Case("", "memory", 8, 8, 8).data(cpu))
    z, codebook = CASE.data(cpu)
    tensors: list[Tensor] = []
    extra = extra_bytes(lambda: tensors.extend(run(z, codebook)), cpu)
    bound = 3 * sum(tensor.nbytes for tensor in tensors) + ALLOWANCE
    print(json.dumps({"operation": operation, "case": str(CASE), "extra_bytes": extra, "bound_bytes": bound}))


def measure_in_subprocess(operation: str) -> dict[str, int | str]:
    """What `main` prints, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", operation]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main(sys.argv[1])
