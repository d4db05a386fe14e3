"""What the demo shows in the terminal; needs rich."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vqkernels.cli._twins import NAMES


@contextmanager
def progress_bar(steps: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """A progress bar; gives a function that takes the losses of a step and moves it on."""
    columns = (
        TextColumn("training both"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=steps, losses="")

        def advance(losses: dict[str, float]) -> None:
            shown = "  ".join(f"{name} {losses[name]:.4f}" for name in NAMES)
            progress.update(task, advance=1, losses=f"loss: {shown}")

        yield advance


def print_table(metrics: dict[str, Any]) -> None:
    """Prints the figures of metrics.json as two tables: agreement, and each model for itself."""
    console = Console()
    equal, provenance = metrics["equal_weights"], metrics["provenance"]
    console.print()
    agreement = Table("reference and fused", "", title="Agreement", title_justify="left")
    agreement.columns[1].justify = "right"
    agreement.add_row(
        f"equal codes at equal weights, {equal['compared_codes']:,} codes of held-out digits",
        f"{equal['equal_codes']:.4%}",
    )
    agreement.add_row(
        f"largest loss difference at equal weights, {equal['compared_losses']} batches",
        f"{equal['largest_loss_difference']:.2g}",
    )
    agreement.add_row("equal codes, each after its own training", f"{metrics['trained_apart']['equal_codes']:.2%}")
    console.print(agreement)

    where = f"{provenance['device']}, threads: {provenance['threads']}, {provenance['cpu_capability']}"
    table = Table("", *NAMES, "ratio", title=f"Quality and time ({where})", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for label, key, style in (
        ("held-out PSNR, dB", "psnr_db", ".2f"),
        ("perplexity of the codes", "perplexity", ".1f"),
        (f"codes in use, of {metrics['options']['codes']}", "used_codes", "d"),
    ):
        table.add_row(label, *(format(metrics[name][key], style) for name in NAMES), "")
    for label, key in (
        ("quantizer: forward, backward, EMA", "quantizer_seconds"),
        ("whole training step", "step_seconds"),
    ):
        for kind in ("minimum", "median"):
            table.add_row(
                f"{label}, ms, {kind}",
                *(f"{1e3 * metrics[name][key][kind]:.2f}" for name in NAMES),
                f"{metrics['reference_over_fused'][key][kind]:.2f} x",
            )
    console.print(table)
