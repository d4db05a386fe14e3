"""Fixtures of all tests: fresh memory holds NaN, threads and deterministic mode are as they were after every test."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# What tests share lies in modules of this folder; test files of equal names in different folders stay apart.
sys.path.append(str(Path(__file__).parent / "ops" / "support"))

# Workers of pytest-xdist share the cores; threads that wait for one another's cores would spin.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))

settings.register_profile(
    "vqkernels",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("vqkernels")

# Files of few tests that take longest, the longest first: begun last, one of them would run on alone.
LONG = [
    f"{name}.py"
    for name in (
        "triton/test_interpreter",
        "sanitizers/test_sanitizers",
        "distributed/test_distributed",
        "triton/test_compile",
    )
]


def pytest_configure(config):
    """pytest-xdist begins files as they are ordered here, not those of most tests first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    def place(item):
        return next((i for i, name in enumerate(LONG) if item.path.as_posix().endswith(f"/tests/{name}")), len(LONG))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty, and through it every output that a kernel allocates, is filled with NaN or the largest integer."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
