"""The picture of the demo; needs matplotlib."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FormatStrFormatter
from torch import Tensor

from vqkernels.cli._measure import code_counts
from vqkernels.cli._twins import NAMES, Twins
from vqkernels.models import VQVAE

SHOWN_IMAGES = 10
INK, MUTED, GRID = "#1c1e21", "#6b7280", "#e5e7eb"
COLORS = {"reference": "#e07a1f", "fused": "#1f6fb4"}
UNEQUAL = "#d11149"
COLOR_KEY = (
    "A code has the colour of the patches it stands for: the more ink, the darker; the hue is the direction in which "
    "ink increases. Unequal codes are framed in red."
)


def draw(path: Path, twins: Twins, training: Tensor, held_out: Tensor, metrics: dict[str, Any]) -> None:
    """Writes the picture: held-out digits and what both models make of them above, losses and use of codes below.

    Args:
        path: of the PNG.
        twins: the trained models.
        training: images [N, 1, H, W] with values from 0 to 1.
        held_out: the same, other images.
        metrics: as in metrics.json.
    """
    figure = Figure(figsize=(12, 10.2), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2, 1, height_ratios=(6, 2.8), hspace=0.23, left=0.115, right=0.975, top=0.89, bottom=0.065
    )
    _title(figure, metrics)
    _draw_digits(figure, grid[0], twins, training, held_out[:SHOWN_IMAGES])
    charts = grid[1].subgridspec(1, 2, wspace=0.17)
    _draw_losses(figure.add_subplot(charts[0]), metrics)
    _draw_use(
        figure.add_subplot(charts[1]), {name: code_counts(twins[name], training, held_out) for name in NAMES}, metrics
    )
    figure.savefig(path)


def code_colors(model: VQVAE, images: Tensor) -> Tensor:
    """A colour for each code, [K, 3], from the mean of the image patches that it stands for.

    The darker the patch, the darker the colour; the hue is the direction in which ink increases.
    """
    indices = model.codes(images).flatten()
    patches = F.unfold(images, model.stride, stride=model.stride).mT.flatten(0, 1).double()
    counts = torch.bincount(indices, minlength=model.codebook_size).clamp(min=1)
    sums = patches.new_zeros(model.codebook_size, patches.shape[1]).index_add_(0, indices, patches)
    means = (sums / counts.unsqueeze(-1)).unflatten(1, (model.stride, model.stride)).cpu()
    half = model.stride // 2
    right = means[:, :, half:].mean((1, 2)) - means[:, :, :half].mean((1, 2))
    down = means[:, half:].mean((1, 2)) - means[:, :half].mean((1, 2))
    hue = torch.atan2(down, right) / (2 * math.pi) % 1
    saturation = (1.5 * torch.hypot(right, down)).clamp(max=0.85)
    return torch.from_numpy(hsv_to_rgb(torch.stack([hue, saturation, 1 - 0.8 * means.mean((1, 2))], -1).numpy()))


def _title(figure: Figure, metrics: dict[str, Any]) -> None:
    equal, ratio, where = metrics["equal_weights"], metrics["reference_over_fused"], metrics["provenance"]
    difference = f"at most {equal['largest_loss_difference']:.1g}" if equal["largest_loss_difference"] else "nothing"
    figure.text(0.02, 0.962, "A VQ-VAE on handwritten digits it has not seen", fontsize=17, color=INK, weight="bold")
    lines = (
        f"The reference in plain PyTorch and the same model on fused kernels, {metrics['options']['steps']} steps each "
        f"on {metrics['images']['training']:,} other digits, from the same weights with the same batches.",
        f"At equal weights {equal['equal_codes']:.2%} of codes are equal and losses differ by {difference}. "
        f"Fused: quantizer {ratio['quantizer_seconds']['minimum']:.1f} x, whole step "
        f"{ratio['step_seconds']['minimum']:.2f} x as fast ({where['device']}, threads: {where['threads']}).",
    )
    for y, line in zip((0.936, 0.914), lines, strict=True):
        figure.text(0.02, y, line, fontsize=10.5, color=MUTED)


@torch.no_grad()
def _draw_digits(figure: Figure, place: Any, twins: Twins, training: Tensor, images: Tensor) -> None:
    colors = code_colors(twins["reference"], training)
    same_weights = copy.deepcopy(twins["fused"])
    same_weights.load_state_dict(twins["reference"].state_dict())
    codes = [model.codes(images).cpu() for model in (twins["reference"], same_weights)]
    unequal = codes[0] != codes[1]
    rows = [
        ("original", INK, images[:, 0].cpu()),
        *((f"reconstruction,\n{name}", COLORS[name], twins[name].reconstruct(images)[:, 0].cpu()) for name in NAMES),
        ("codes,\nreference", COLORS["reference"], colors[codes[0]]),
        ("codes, fused at\nequal weights", COLORS["fused"], colors[codes[1]]),
    ]
    grid = place.subgridspec(len(rows), len(images), hspace=0.08, wspace=0.08)
    bottom = place.get_position(figure).y0
    figure.text(0.115, bottom - 0.018, COLOR_KEY, fontsize=9, color=MUTED)
    for i, (label, color, pictures) in enumerate(rows):
        for j, picture in enumerate(pictures):
            axes = figure.add_subplot(grid[i, j])
            axes.imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color(GRID)
            if j == 0:
                axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10, color=color, labelpad=8)
            if i == len(rows) - 1:
                for y, x in unequal[j].nonzero().tolist():
                    axes.add_patch(
                        Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, fill=False, edgecolor=UNEQUAL, linewidth=2)
                    )


def _style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, color=INK, weight="bold")
    axes.set_xlabel(xlabel, color=MUTED)
    axes.set_ylabel(ylabel, color=MUTED)
    axes.tick_params(which="both", colors=MUTED, length=3)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)


def _draw_losses(axes: Axes, metrics: dict[str, Any]) -> None:
    _style(axes, "Training loss", "step", "loss")
    for name, width in (("reference", 3.2), ("fused", 1.2)):
        losses = metrics[name]["losses"]
        label = f"{name}: {metrics[name]['psnr_db']:.2f} dB PSNR on held-out digits"
        axes.plot(range(1, len(losses) + 1), losses, color=COLORS[name], linewidth=width, label=label)
    axes.set_yscale("log", subs=(2, 5))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    axes.grid(which="minor", axis="y", color=GRID, linewidth=0.8)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)


def _draw_use(axes: Axes, counts: dict[str, Tensor], metrics: dict[str, Any]) -> None:
    _style(axes, "Use of the codes, each model after its own training", "code, most used first", "share, %")
    shares = {name: (100 * counts[name] / counts[name].sum()).sort(descending=True).values.cpu() for name in NAMES}
    label = "{}: {} in use, perplexity {:.0f}"
    labels = {name: label.format(name, metrics[name]["used_codes"], metrics[name]["perplexity"]) for name in NAMES}
    edges = range(len(shares["fused"]) + 1)
    color = COLORS["reference"]
    axes.stairs(shares["reference"], edges, fill=True, color=color, alpha=0.4, label=labels["reference"])
    axes.stairs(shares["fused"], edges, color=COLORS["fused"], linewidth=1.4, label=labels["fused"])
    axes.set_xlim(0, edges[-1])
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
