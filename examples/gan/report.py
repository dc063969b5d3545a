"""What a run leaves for people: the sample grid, the curves and the summary."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gan.metrics import Quality
from gan.training import History, Settings

matplotlib.use("Agg")  # files only: works without a display


def grid_labels(n_classes: int, rows: int = 8, columns: int = 10) -> Tensor:
    """Return the labels [rows * columns] of a grid, row by row.

    Each column shows one class; where there are more classes than columns, they come one after another.
    """
    if n_classes > columns:
        return torch.arange(rows * columns) % n_classes
    return (torch.arange(columns) % n_classes).repeat(rows)


def save_grid(pixels: Tensor, path: Path, columns: int = 10, pixel_size: int = 4) -> None:
    """Write images [n, 1 or 3, size, size] in [-1, 1], row by row, each pixel enlarged to pixel_size^2 of the file."""
    n, channels, size, _ = pixels.shape
    framed = torch.nn.functional.pad(pixels.detach().cpu(), (1, 1, 1, 1), value=-1)
    rows = framed.view(n // columns, columns, channels, size + 2, size + 2)
    picture = rows.permute(0, 3, 1, 4, 2).reshape(n // columns * (size + 2), columns * (size + 2), channels)
    enlarged = picture.repeat_interleave(pixel_size, 0).repeat_interleave(pixel_size, 1)
    rgb = enlarged.expand(-1, -1, 3).add(1).div(2).clamp(0, 1)
    plt.imsave(path, rgb.numpy())


def save_curves(history: History, title: str, path: Path) -> None:
    """Write the losses and, by layer of the discriminator, sigma and the norm of the weight's gradient."""
    figure, (losses, sigma, gradient) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    losses.plot(history.step, history.loss_discriminator, label="discriminator")
    losses.plot(history.step, history.loss_generator, label="generator")
    losses.set_title("hinge loss")
    losses.legend()
    for axes, curves, name in (
        (sigma, history.sigma, r"$\sigma$ of the discriminator's weights"),
        (gradient, history.gradient, "gradient norm of the discriminator's weights"),
    ):
        for layer, values in curves.items():
            axes.plot(history.step, values, label=layer)
        axes.set_title(name)
        axes.set_yscale("log")
    handles, labels = sigma.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    for axes in (losses, sigma, gradient):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def print_summary(settings: Settings, steps: int, seconds: float, quality: Quality | None, files: list[Path]) -> None:
    """Print the run's figures and where its files are; `quality` is None for data of a single class."""
    table = Table(show_header=False)
    table.add_row("data", f"{settings.data}, {settings.size} x {settings.size}")
    table.add_row("normalisation", describe(settings))
    table.add_row("steps", f"{steps}, of which here in {seconds:.0f} s")
    if quality is not None:
        table.add_row(
            "Frechet distance",
            f"{quality.frechet:.2f} (two halves of the real images: {quality.frechet_of_real_halves:.2f})",
        )
        table.add_row(
            "classifier score, precision, recall",
            f"{quality.classifier_score:.2f}, {quality.precision:.2f}, {quality.recall:.2f}",
        )
        if settings.network == "projection":
            table.add_row("recognised as the class asked for", f"{quality.label_agreement:.1%} of the generated images")
        table.add_row("accuracy of the classifier", f"{quality.classifier_accuracy:.1%} on held-out real images")
    for path in files:
        table.add_row(path.stem, str(path))
    console = Console()
    console.print(table)
    if quality is None:
        console.print(
            "No Frechet distance: its features come from a classifier, which needs classes of several images."
        )
    else:
        console.print(
            "These figures use a small classifier trained here on the real images: they compare runs of this script "
            "with each other and not with any published FID."
        )


def describe(settings: Settings) -> str:
    """Return the normalisation in words, with its scale where it has one."""
    return f"{settings.norm}, scale {settings.scale:.4g}" if settings.norm in ("ssn", "bssn") else settings.norm
