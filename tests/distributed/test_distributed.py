"""Several processes with one codebook: the checks of support/distributed_checks.py under torchrun."""

import pytest
import torch
from distributed_checks import CHECKS, PROCESSES, reproducible_training

from vqkernels.nn import VectorQuantize


@pytest.mark.parametrize(("processes", "check"), [(n, check) for n in PROCESSES for check in CHECKS[n]])
def test_check(launch, processes, check):
    outcome = launch(processes).outcome(check)
    assert not outcome, outcome


def test_reproducible_whatever_the_number_of_processes(launch):
    """The codebooks of one, two and four processes over the same rows, bit for bit."""
    alone = reproducible_training(0, 1)
    for processes in PROCESSES:
        states = torch.load(launch(processes).folder / "reproducible.pt")
        assert len(states) == len(alone)
        for found, expected in zip(states, alone, strict=True):
            assert torch.equal(found, expected)


def test_synchronization_needs_a_process_group():
    layer = VectorQuantize(4, 8, sync_codebook=True)
    assert layer.state_dict()["_codebook.embed"].shape == (1, 8, 4)
    assert layer.eval()(torch.randn(2, 3, 4))[1].shape == (2, 3)
    with pytest.raises(RuntimeError, match=r"sync_codebook: expected a process group .*init_process_group"):
        layer.train()(torch.randn(2, 3, 4))
