"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from gan.report import save_grid
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from experiments.plan import NO_NORM, VARIANTS
from experiments.tables import INITIAL, NAMES, Records, final, scale_medians, variance_ratios

matplotlib.use("Agg")
COLOURS = dict(zip((NO_NORM, *VARIANTS), ("0.4", "C0", "C1", "C2", "C3"), strict=True))
DPI = 75


def _band(axes: Axes, x: Sequence[float], curves: Sequence[Sequence[float]], **options: Any) -> None:
    """Draw the median of curves, one per seed, and their range; of runs that ended early, as far as all go."""
    length = min(map(len, curves))
    y = np.asarray([curve[:length] for curve in curves], dtype=float)
    axes.plot(x[:length], np.median(y, axis=0), **options)
    axes.fill_between(x[:length], y.min(0), y.max(0), color=options.get("color"), alpha=0.15, linewidth=0)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def gradients(records: Records, path: Path) -> None:
    """Claim 1: slopes of the discriminator, gradients of its first and last layer, and the samples' distance."""
    p, data = records.profile, records.profile.data[0]
    small, large = p.extreme_scale, p.scales[-1]
    cases = [("none", NO_NORM, None, "0.4"), (f"BSSN, c = {small:.3g}", "bssn", small, "C4")]
    cases += [("SN", "sn", None, "C0"), ("BSSN", "bssn", None, "C3"), (f"BSSN, c = {large:.3g}", "bssn", large, "C5")]
    figure, panels = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")
    for name, norm, scale, colour in cases:
        runs = records.seeds(data, norm, scale)
        steps = runs[0]["history"]["step"]
        layers = list(runs[0]["history"]["gradient"])
        options = {"label": name, "color": colour}
        _band(panels[0], steps, [run["history"]["slope"] for run in runs], **options)
        _band(panels[1], steps, [run["history"]["gradient"][layers[0]] for run in runs], **options)
        _band(panels[2], steps, [run["history"]["gradient"][layers[-1]] for run in runs], **options)
        at = [step for step, _ in runs[0]["frechet"]]
        _band(panels[3], at, [[float(d) for _, d in run["frechet"]] for run in runs], **options)
    titles = ("|dD/dx| at real images", "|dL/dW|, first layer", "|dL/dW|, last layer", "Frechet distance of samples")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    _save(figure, path)


def variances(records: Records, path: Path) -> None:
    """Claim 2: variances over training by layer, over those of the initialisation that each variant parallels."""
    data = records.profile.data[0]
    figure, panels = plt.subplots(1, 4, figsize=(18, 4), layout="constrained", sharey=True)
    for axes, norm in zip(panels, VARIANTS, strict=True):
        runs = records.seeds(data, norm)
        ratios = [variance_ratios(run) for run in runs]
        for j, layer in enumerate(ratios[0]):
            label = f"{layer}: {runs[0]['history']['initial'][layer][0] ** -1:.0f} inputs"
            _band(axes, runs[0]["history"]["step"], [r[layer] for r in ratios], color=f"C{j}", label=label)
        axes.axhline(1, color="black", linewidth=1)
        axes.set(title=f"{NAMES[norm]}: variance / {INITIAL[norm]}", xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
        _plain_labels(axes)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    _save(figure, path)


def operators(rows: Sequence[dict[str, Any]], slopes: Sequence[dict[str, Any]], path: Path) -> None:
    """Claim 3: operators over reshaped kernels with the bound, and the slopes at initialisation."""
    figure, (ratios, bars) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    found = [row for row in rows if row["operator"]]
    names = list(dict.fromkeys(row["set"] for row in found))
    for j, name in enumerate(names):
        mine = [row for row in found if row["set"] == name]
        x = [row["operator"] / row["s_out"] for row in mine]
        y = [row["bound"] / row["s_out"] for row in mine]
        ratios.scatter(x, y, s=18, color=f"C{j}", label=name)
    ends = [0.9, max(row["bound"] / row["s_out"] for row in found)]
    ratios.plot(ends, ends, color="black", linewidth=1, label="operator = bound")
    ratios.set(xlabel="operator / s_out", ylabel="bound / s_out", xscale="log", yscale="log")
    ratios.set_title("Convolution operators, Gaussian kernels")
    ratios.legend(fontsize="small")
    order = list(dict.fromkeys(row["norm"] for row in slopes))
    for j, norm in enumerate(order):
        y = [row["slope"] for row in slopes if row["norm"] == norm]
        bars.scatter([j] * len(y), y, s=18, color=COLOURS.get(norm, "C4"))
    bars.set_xticks(range(len(order)), [NAMES.get(norm, norm) for norm in order])
    bars.set(title="|dD/dx| at initialisation, the paper's CNN at 32 x 32", yscale="log")
    for axes in (ratios, bars):
        axes.grid(alpha=0.3, which="both")
    _save(figure, path)


def _plain_labels(axes: Axes) -> None:
    """Label a logarithmic axis with numbers, not powers."""
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")


def _points(axes: Axes, groups: Sequence[tuple[str, Callable[[str], list[float]]]]) -> None:
    """Draw the values of each variant, and their median as a bar, side by side for each group."""
    for j, (_, values) in enumerate(groups):
        for i, norm in enumerate(VARIANTS):
            y = values(norm)
            x = j + 0.18 * (i - 1.5)
            label = NAMES[norm] if j == 0 else None
            axes.scatter([x] * len(y), y, s=14, color=COLOURS[norm], label=label, alpha=0.7)
            axes.plot([x - 0.08, x + 0.08], [np.median(y)] * 2, color=COLOURS[norm], linewidth=2)
    axes.set_xticks(range(len(groups)), [name for name, _ in groups])
    axes.set(yscale="log", ylabel="Frechet distance")
    _plain_labels(axes)
    axes.grid(alpha=0.3, axis="y", which="both")
    axes.legend(fontsize="small")


def stability(records: Records, path: Path) -> None:
    """Claim 4: distances over learning rates and critic steps, and over the scale."""
    p, data = records.profile, records.profile.data[0]
    figure, (grid, scale) = plt.subplots(1, 2, figsize=(15, 4.5), layout="constrained", width_ratios=(2, 1))
    groups: list[tuple[str, Callable[[str], list[float]]]] = [
        (f"{g:g}, {d:g}", lambda v, g=g, d=d: records.frechet(data, v, lr_generator=g, lr_discriminator=d))
        for g, d in p.rate_pairs()
    ]
    groups.append((f"{p.critic_steps} critic steps", lambda v: records.frechet(data, v, critic_steps=p.critic_steps)))
    _points(grid, groups)
    grid.set_xlabel("learning rates: generator, discriminator")
    for norm in ("ssn", "bssn"):
        medians = scale_medians(records, norm)
        y = [m.median for m in medians.values()]
        errors = [[m.median - m.low for m in medians.values()], [m.high - m.median for m in medians.values()]]
        scale.errorbar(list(medians), y, errors, color=COLOURS[norm], label=NAMES[norm], capsize=3, marker="o")
    scale.set(xscale="log", yscale="log", xlabel="scale c", ylabel="Frechet distance, median and 95% interval")
    scale.set_xticks(scales := (p.extreme_scale, *p.scales), [f"{c:.2g}" for c in scales])
    scale.minorticks_off()
    scale.set_yticks(ticks := (2, 3, 5, 10, 20, 50), list(map(str, ticks)))
    scale.grid(alpha=0.3)
    scale.legend()
    _save(figure, path)


def samples(records: Records, data: str, path: Path) -> None:
    """Claim 5: samples of seed 0; one row for each of none, SN, SSN, BSN and BSSN."""
    rows = [records.seeds(data, norm)[0]["samples"] for norm in (NO_NORM, *VARIANTS)]
    pixels = torch.tensor(rows, dtype=torch.float32).flatten(0, 1) / 127.5 - 1
    save_grid(pixels, path, columns=len(rows[0]))


def quality(records: Records, path: Path) -> None:
    """Claim 5: the final distances of all seeds by variant and kind of images."""
    figure, panels = plt.subplots(
        1, len(records.profile.data), figsize=(5 * len(records.profile.data), 4), squeeze=False
    )
    for axes, data in zip(panels[0], records.profile.data, strict=True):
        for j, norm in enumerate((NO_NORM, *VARIANTS)):
            y = [final(run) for run in records.seeds(data, norm)]
            axes.scatter([j] * len(y), y, s=18, color=COLOURS[norm])
            axes.plot([j - 0.2, j + 0.2], [np.median(y)] * 2, color=COLOURS[norm], linewidth=2)
        axes.set_xticks(range(len(NAMES)), list(NAMES.values()))
        axes.set(title=data, ylabel="Frechet distance", yscale="log")
        _plain_labels(axes)
        axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    _save(figure, path)
