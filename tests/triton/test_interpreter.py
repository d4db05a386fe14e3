"""Runs the tests of this folder on CPU, in a process in which Triton interprets its kernels from the start."""

import os
import re
import subprocess
import sys
from pathlib import Path


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command], env=os.environ | environment, capture_output=True, text=True, timeout=1200
    )


def test_interpreted_kernels():
    processes = max(1, os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
    done = run(
        *("-m", "pytest", str(Path(__file__).parent), "--ignore", __file__, "--import-mode=importlib"),
        *("-p", "no:cacheprovider", "-n", str(processes)),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) >= 700, done.stdout
    assert "skipped" not in done.stdout


def test_imported_only_when_used():
    done = run("-c", "import sys, vqkernels; sys.exit('vqkernels.triton' in sys.modules)", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
