"""Pictures of many small images; needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

INK, MUTED = "#1c1e21", "#6b7280"
CELL, GAP = 0.62, 0.125  # inches of an image, gap between two as a share of its side


def draw_grid(
    path: Path,
    rows: Sequence[tuple[str, Tensor]],
    columns: Sequence[str] = (),
    *,
    title: str = "",
    lines: Sequence[str] = (),
) -> None:
    """Writes a PNG of rows of images, ink black on white.

    Args:
        path: of the PNG.
        rows: the label of a row, and its images [n, 1, H, W] with values from 0 to 1; a short one is filled up.
        columns: labels above the columns; none for none.
        title: above everything.
        lines: smaller, below the title.
    """
    width = max(len(images) for _, images in rows)
    height, side = rows[0][1].shape[-2:]
    gap = max(1, round(side * GAP))
    canvas = torch.full((len(rows) * (height + gap) - gap, width * (side + gap) - gap), torch.nan)
    for i, (_, images) in enumerate(rows):
        for j, image in enumerate(images.cpu()):
            y, x = i * (height + gap), j * (side + gap)
            canvas[y : y + height, x : x + side] = image[0]

    margin = 0.35 + 0.11 * max(len(label) for label, _ in rows)
    top = 0.25 + (0.32 if title else 0) + 0.21 * len(lines) + (0.25 if columns else 0)
    inches = max(width * CELL, 5.2 if title else 0), len(rows) * CELL
    size = inches[0] + margin + 0.15, inches[1] + top + 0.15
    figure = Figure(figsize=size, dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((margin / size[0], 0.15 / size[1], width * CELL / size[0], inches[1] / size[1]))
    axes.imshow(canvas.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_yticks([i * (height + gap) + height / 2 - 0.5 for i in range(len(rows))], [label for label, _ in rows])
    axes.set_xticks([j * (side + gap) + side / 2 - 0.5 for j in range(len(columns))], columns)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, colors=MUTED, labelsize=9)
    axes.spines[:].set_visible(False)
    below = 0.3
    if title:
        figure.text(0.15 / size[0], 1 - below / size[1], title, fontsize=12, color=INK, weight="bold")
        below += 0.25
    for line in lines:
        figure.text(0.15 / size[0], 1 - below / size[1], line, fontsize=8, color=MUTED)
        below += 0.2
    figure.savefig(path, format="png")
