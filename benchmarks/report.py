"""Where the figures come from, and the figures as tables: JSON, Markdown and on the terminal."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import vqkernels
from benchmarks.measure import OURS, TURN, Settings
from vqkernels import _C

COLUMNS = (
    "provider", "min ms", "median ms", "x ours", "G/s", "of limit", "extra MiB", "differs", "not nearest", "error"
)  # fmt: skip
PACKAGES = ("torch", "triton", "numpy", "faiss-cpu", "scikit-learn", "vector-quantize-pytorch", "flash-kmeans")
UNITS = {"fma": "GFLOP/s, of the FMA peak", "copy": "GB/s, of a copy that moves as many bytes"}


def provenance(settings: Settings) -> dict[str, Any]:
    """The machine, the versions and the commit."""
    is_cuda = settings.device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "vqkernels": vqkernels.__version__,
        "commit": _commit(),
        "build": vqkernels.build_info(),
        "device": settings.device.type,
        "gpu": torch.cuda.get_device_name(settings.device) if is_cuda else None,
        "cpu": _cpu_model(),
        "cpu_capability": _C.cpu_capability(),
        "threads": settings.threads,
        "rounds": settings.rounds,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _commit() -> str | None:
    """The commit of this tree, with "+" where files differ from it; None outside a repository."""
    root = Path(__file__).parent
    try:
        output = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return output.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(report: dict[str, Any]) -> str:
    """The GPU, or the CPU with its instruction set and threads."""
    origin = report["provenance"]
    return origin["gpu"] or f"{origin['cpu']}, {origin['cpu_capability']}, {origin['threads']} thread(s)"


def cells(result: dict[str, Any]) -> list[str]:
    """One line of a table; a provider that did not run says why instead."""
    if result["unavailable"]:
        return [result["provider"], result["unavailable"]]
    figures, extra, fraction = result["check"], result["extra_bytes"], result["fraction"]
    return [
        result["provider"],
        f"{result['min_s'] * 1e3:.3f}",
        f"{result['median_s'] * 1e3:.3f}",
        f"{result['ratio']:.2f}",
        f"{result['rate'] / 1e9:.1f}",
        f"{fraction:.1%}" if fraction is not None else "-",
        f"{extra / 2**20:.1f}" if extra is not None else "-",
        f"{figures['differs']:.3%}" if "differs" in figures else "-",
        f"{figures['not_nearest']:.3%}" if "not_nearest" in figures else "-",
        f"{figures['error']:.1e}" if "error" in figures else "-",
    ]


def heading(record: dict[str, Any]) -> str:
    limit = record["limit"]
    rate = f"{limit['rate'] / 1e9:.1f}" if limit["rate"] else "unknown"
    return f"{record['operation']}, {record['case']}: limit {rate} {UNITS[limit['kind']].partition(',')[0]}"


def print_table(console: Console, record: dict[str, Any]) -> None:
    """A table on the terminal, and below it who is missing and why."""
    table = Table(title=heading(record), title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "provider" else "right", no_wrap=True)
    for result in record["results"]:
        if not result["unavailable"]:
            table.add_row(*cells(result), style="bold" if result["provider"] == OURS else None)
    console.print(table)
    for result in record["results"]:
        if result["unavailable"]:
            console.print(f"  {result['provider']}: {result['unavailable']}", style="dim", highlight=False)
    if record["limit"]["unavailable"]:
        console.print(f"  {record['limit']['unavailable']}", style="dim", highlight=False)


def markdown(report: dict[str, Any]) -> str:
    """All tables."""
    origin = report["provenance"]
    lines = [
        "# Benchmarks",
        "",
        f"vqkernels {origin['vqkernels']} ({origin['commit'] or 'no commit'}), torch {origin['packages']['torch']}, "
        f"{machine(report)}, {origin['date']}.",
        "",
        f"Times are of at most {origin['rounds']} interleaved rounds, each of the samples that fit in "
        f"{1000 * TURN:.0f} ms, after a call that is not timed (but for calls of over a second); "
        '"x ours" is the ratio of the minima. "G/s" is '
        + ", or ".join(UNITS.values())
        + ', both measured between the rounds. "differs" is the share of rows whose code is not the canonical one, '
        '"not nearest" the share whose code is farther away in float64 than the nearest one, "error" the largest '
        "relative error of the real-valued results.",
    ]
    for record in report["groups"]:
        lines += ["", f"## {heading(record)}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' + ' ---: |' * (len(COLUMNS) - 1)}"]
        for result in record["results"]:
            row = cells(result)
            lines.append(f"| {' | '.join(row + [''] * (len(COLUMNS) - len(row)))} |")
    return "\n".join(lines) + "\n"


def write_json(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")
