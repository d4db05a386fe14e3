"""Figures of a search report: time against codes and against rows, and the fraction of the FMA peak."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from benchmarks.measure import OURS
from benchmarks.report import machine

# Ours in vermilion, the peers in the quieter colours of Okabe and Ito's palette, which colour-blind readers tell apart.
STYLES = {
    OURS: ("#d55e00", "o"),
    "addmm+argmax": ("#0072b2", "s"),
    "torch.compile": ("#56b4e9", "D"),
    "cdist+argmin": ("#009e73", "^"),
    "faiss": ("#cc79a7", "v"),
    "scikit-learn": ("#b59f00", "P"),
    "vector-quantize-pytorch": ("#7f7f7f", "X"),
    "flash-kmeans": ("#222222", "*"),
}


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """Writes scaling.png and fma_fraction.png, each where the report has groups for it."""
    search = [record for record in report["groups"] if record["operation"] == "nearest_code"]
    place = machine(report)
    paths = []
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        if any(record["group"] in ("more codes", "more rows") for record in search):
            paths.append(_plot_scaling(search, place, folder / "scaling.png"))
        bars = [r for r in search if r["group"] in ("published", "large codebook", "own") and r["limit"]["rate"]]
        if bars:
            paths.append(_plot_fractions(bars, place, folder / "fma_fraction.png"))
    return paths


def _plot_scaling(search: list[dict[str, Any]], place: str, path: Path) -> Path:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    _plot_times(axes[0], [r for r in search if r["group"] == "more codes"], "codes", "codes K")
    _plot_times(axes[1], [r for r in search if r["group"] == "more rows"], "rows", "rows N")
    axes[0].set_ylabel("time of a search, ms (minimum)")
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Nearest-code search, float32: {place}", fontsize=11)
    return _save(figure, path)


def _plot_times(ax: Axes, records: list[dict[str, Any]], size: str, label: str) -> None:
    for name, (colour, marker) in STYLES.items():
        points = [
            (record[size], result["min_s"] * 1e3)
            for record in records
            for result in record["results"]
            if result["provider"] == name and not result["unavailable"]
        ]
        if points:
            ours = name == OURS
            ax.plot(
                *zip(*sorted(points), strict=True),
                color=colour,
                marker=marker,
                markersize=6 if ours else 5,
                linewidth=2.4 if ours else 1.2,
                zorder=3 if ours else 2,
                label=name,
            )
    if records:
        others = {(record["codes"] if size == "rows" else record["rows"], record["dim"]) for record in records}
        fixed = ", ".join(f"{'K' if size == 'rows' else 'N'} = {number:,}, D = {dim}" for number, dim in others)
        ax.set_title(fixed, loc="left", fontsize=10)
    ax.set(xscale="log", yscale="log", xlabel=label)
    ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)


def _plot_fractions(records: list[dict[str, Any]], place: str, path: Path) -> Path:
    names = [name for name in STYLES if any(_fraction(record, name) for record in records)]
    width = 0.84 / len(names)
    figure, ax = plt.subplots(figsize=(max(6.0, 1.6 * len(records) + 1), 4.6), layout="constrained")
    for position, name in enumerate(names):
        heights = [_fraction(record, name) or 0 for record in records]
        places = [group + (position - (len(names) - 1) / 2) * width for group in range(len(records))]
        bars = ax.bar(places, heights, 0.92 * width, color=STYLES[name][0], label=name)
        if name == OURS:
            ax.bar_label(bars, [f"{height:.0%}" for height in heights], padding=2, fontsize=9, color=STYLES[name][0])
    ax.set_xticks(range(len(records)), [_two_lines(record) for record in records], fontsize=9)
    ax.tick_params(axis="x", length=0)
    ax.axhline(1, color="#444444", linewidth=0.8, linestyle="--")
    ax.set_ylim(0, 1.06)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(xlabel="rows N x codes K x dimension D", ylabel="fraction of the measured FMA peak")
    ax.grid(True, axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Nearest-code search, float32: {place}", fontsize=11)
    return _save(figure, path)


def _fraction(record: dict[str, Any], name: str) -> float | None:
    return next((result.get("fraction") for result in record["results"] if result["provider"] == name), None)


def _two_lines(record: dict[str, Any]) -> str:
    name, _, size = record["case"].rpartition(" ")
    return f"{name}\n{size}".replace("x", " x ") if name else "\n" + size.replace("x", " x ")


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
