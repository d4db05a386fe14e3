"""Fixtures of the distributed tests: one launch of torchrun for each number of processes runs all of their checks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent / "support"
ROOT = Path(__file__).parents[2]

sys.path.append(str(SUPPORT))


class Launch:
    """What the processes of one launch have reported.

    Attributes:
        folder: what they have written.
        log: what they have printed.
    """

    def __init__(self, folder: Path, log: str, processes: int) -> None:
        self.folder = folder
        self.log = log
        reports = [folder / f"rank{rank}.json" for rank in range(processes)]
        self.reports = [json.loads(path.read_text()) if path.exists() else {} for path in reports]

    def outcome(self, check: str) -> str:
        """What went wrong in a check, in any process; "" if nothing."""
        missing = f"did not finish\n{self.log}"
        outcomes = {rank: report.get(check, missing) for rank, report in enumerate(self.reports)}
        return "\n".join(f"rank {rank}: {outcome}" for rank, outcome in outcomes.items() if outcome)


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """A function of the number of processes that gives their `Launch`."""
    launches = {}

    def run(processes: int) -> Launch:
        if processes not in launches:
            folder = tmp_path_factory.mktemp(f"{processes}_processes")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            result = subprocess.run(
                [*command, str(SUPPORT / "distributed_checks.py"), str(folder)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
                check=False,
            )
            launches[processes] = Launch(folder, result.stdout[-6000:], processes)
        return launches[processes]

    return run
