"""A small model, and what a run of it leaves."""

import dataclasses

import pytest
import torch

from vqkernels.training.config import DiTConfig
from vqkernels.training.data import Labelled

TINY = DiTConfig(
    steps=6, batch_size=8, warmup=3, ema_decay=0.9, hidden_size=16, depth=2, num_heads=2, class_dropout=0.3, threads=1
)


@pytest.fixture
def tiny():
    """Makes the configuration of a small model, with changes."""
    return lambda **changes: dataclasses.replace(TINY, **changes)


@pytest.fixture(scope="session")
def few_digits():
    generator = torch.Generator().manual_seed(0)
    return Labelled(torch.rand(40, 1, 8, 8, generator=generator), torch.arange(40) % 10)
