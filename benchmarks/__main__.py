"""python -m benchmarks: compares the operations with their peers in one process, correctness first.

Exits with 1 where a result of vqkernels is not the canonical one or memory exceeds its bound, 2 for bad arguments.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import (
    bench_bias_gelu,
    bench_code_statistics,
    bench_ema_update,
    bench_gate_residual_norm_modulate,
    bench_geglu,
    bench_group_norm_silu,
    bench_nearest_code,
    bench_norm_modulate,
    bench_qk_norm_rope,
    bench_residual_quantize,
    bench_residual_vq,
    bench_swiglu,
    bench_vector_quantize,
    memory,
    report,
)
from benchmarks.measure import OURS, Operation, Settings, measure
from benchmarks.pedantic import available

OPERATIONS = {
    module.operation.name: module.operation
    for module in (
        bench_nearest_code,
        bench_vector_quantize,
        bench_residual_quantize,
        bench_residual_vq,
        bench_code_statistics,
        bench_ema_update,
    )
} | {
    table.name: table
    for module in (
        bench_norm_modulate,
        bench_gate_residual_norm_modulate,
        bench_qk_norm_rope,
        bench_bias_gelu,
        bench_swiglu,
        bench_geglu,
        bench_group_norm_silu,
    )
    for table in module.tables
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", action="append", choices=OPERATIONS, help="only this operation (repeatable)")
    parser.add_argument(
        "--shape",
        action="append",
        metavar="TEXT",
        help='only cases whose name, size or group contains TEXT (repeatable); "N,K,D[,Q]" or, for '
        'denoising operations, "B,L,D" measures that size instead',
    )
    parser.add_argument(
        "--provider", action="append", metavar="TEXT", help="only peers whose name contains TEXT (repeatable)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every provider (default 1)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 10, with --quick 3)")
    parser.add_argument("--quick", action="store_true", help="1/16 of the rows, 1/4 of the codes, one image, 3 rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write benchmarks.json, benchmarks.md and plots there")
    parser.add_argument("--list", action="store_true", help="list operations, cases and providers, and stop")
    parser.add_argument("--memory", action="store_true", help=f"check the peak memory of {memory.CASE}, and stop")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if arguments.threads < 1 or (arguments.rounds is not None and arguments.rounds < 1):
        parser.error("--threads and --rounds: expected at least 1")
    return arguments


def plan(arguments: argparse.Namespace) -> list[tuple[Operation, Any, list[str]]]:
    """The tables to measure: operation, case and the names of its providers, vqkernels first."""
    patterns = arguments.shape or []
    texts = [text for text in patterns if not re.fullmatch(r"[\d,]+", text)]
    tables = []
    for name in arguments.op or OPERATIONS:
        operation = OPERATIONS[name]
        own = [case for case in map(operation.parse, patterns) if case]
        matching = [
            case for case in operation.cases if not texts or any(text in f"{case} {case.group}" for text in texts)
        ]
        cases = own + (matching if texts or not patterns else [])
        providers = [
            provider
            for provider in operation.providers
            if provider == OURS or not arguments.provider or any(text in provider for text in arguments.provider)
        ]
        tables += [(operation, case.smaller() if arguments.quick else case, providers) for case in cases]
    return tables


def list_all(console: Console, device: torch.device) -> None:
    for operation in OPERATIONS.values():
        console.print(operation.name, style="bold")
        for case in operation.cases:
            console.print(f"  {case!s:<28}{case.group}", highlight=False)
        for name, reason in available(operation, device).items():
            console.print(f"  {name:<28}{reason or 'available'}", highlight=False)


def check_memory(console: Console) -> int:
    """Prints a line an operation; returns 1 where one exceeds its bound or cannot be measured."""
    status = 0
    for operation in memory.OPERATIONS:
        result = memory.measure_in_subprocess(operation)
        extra, bound = result["extra_bytes"], result["bound_bytes"]
        kept = extra is not None and extra < bound
        status |= not kept
        told = "unknown here" if extra is None else f"{extra / 2**20:.1f} MiB"
        verdict = "within" if kept else "NOT within"
        console.print(f"{operation} {memory.CASE}: extra memory {told}, {verdict} {bound / 2**20:.1f} MiB")
    return int(status)


def run(arguments: argparse.Namespace, console: Console) -> int:
    rounds = arguments.rounds or (3 if arguments.quick else 10)
    device = torch.device(arguments.device)
    settings = Settings(device, arguments.threads, rounds, budget=1.0 if arguments.quick else 8.0)
    tables = plan(arguments)
    if not tables:
        console.print("no case matches --shape; --list shows them")
        return 2
    result: dict[str, Any] = {"provenance": report.provenance(settings), "groups": []}
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    try:
        with progress:
            task = progress.add_task("", total=len(tables) * (rounds + 1))
            for operation, case, providers in tables:
                progress.update(task, description=f"{operation.name}, {case}")
                record = measure(operation, case, providers, settings, lambda: progress.advance(task))
                result["groups"].append(record)
                report.print_table(console, record)
                if arguments.out:
                    report.write_json(result, arguments.out / "benchmarks.json")
    except KeyboardInterrupt:
        console.print("interrupted: the report holds what was measured until then")
        write_report(result, arguments.out, console)
        return 130
    write_report(result, arguments.out, console)
    return report_faults(result, console)


def write_report(result: dict[str, Any], folder: Path | None, console: Console) -> None:
    if folder is None:
        return
    from benchmarks.plots import plot

    (folder / "benchmarks.md").write_text(report.markdown(result))
    written = ["benchmarks.json", "benchmarks.md", *[path.name for path in plot(result, folder)]]
    console.print(f"wrote {', '.join(written)} to {folder}")


def report_faults(result: dict[str, Any], console: Console) -> int:
    """Names the tables in which vqkernels is wrong; returns the exit status."""
    status = 0
    for record in result["groups"]:
        figures = record["results"][0]["check"]
        if figures.get("differs") or figures.get("beyond_bound"):
            console.print(f"vqkernels is wrong: {record['operation']}, {record['case']}: {figures}", style="bold red")
            status = 1
    return status


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 132)
    torch.set_num_threads(arguments.threads)
    if arguments.list:
        list_all(console, torch.device(arguments.device))
        return 0
    return check_memory(console) if arguments.memory else run(arguments, console)


if __name__ == "__main__":
    sys.exit(main())
