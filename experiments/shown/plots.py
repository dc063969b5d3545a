"""The pictures of the report, from its data frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from gan.report import save_grid
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from experiments.measures.statistics import median_interval
from experiments.plan import NO_NORM, VARIANTS, Profile
from experiments.shown.frames import NAMES, Frames, in_order, label
from experiments.shown.tables import INITIAL, all_rates, all_scales, by_case, explosions, narrow, study

matplotlib.use("Agg")
COLOURS = dict(zip((NO_NORM, *VARIANTS), ("0.4", "C0", "C1", "C2", "C3"), strict=True)) | {"strict": "C4"}
SCALED = {0.3: "navy", 0.7: "C9", 2.0: "C6", 4.0: "C4"}
"""Of BSSN, by scale."""
DPI = 75
SLOPES = (1e-13, 1e9)
"""The range of slopes that is drawn."""
DIVERGED = 3.0
"""Runs that diverged are drawn at so many times the largest distance of the others."""


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _band(axes: Axes, frame: pd.DataFrame, x: str, y: str, **options: Any) -> None:
    """Draw the median over seeds of y at each x, and its range."""
    found = frame.groupby(x)[y].agg(["median", "min", "max"]).clip(1e-30, 1e30)
    axes.plot(found.index, found["median"], **options)
    axes.fill_between(found.index, found["min"], found["max"], color=options.get("color"), alpha=0.15, linewidth=0)


def _colour(norm: str, scale: float) -> str:
    """Return the colour of a variant, or of BSSN with another scale than the default."""
    return COLOURS[norm] if label(norm, scale) in NAMES.values() else SCALED[scale]


def depth(frames: Frames, path: Path) -> None:
    """Claim 1: slopes at initialisation by depth and by scale, the largest by learning rate, in training by depth."""
    figure, grid = plt.subplots(2, 3, figsize=(15, 9), layout="constrained", sharey=True)
    by_depth, by_scale, by_rate = grid[0]
    depths = sorted(frames.initial["layers"].unique())
    _initial_by_depth(by_depth, frames.initial, depths)
    _initial_by_scale(by_scale, frames.initial, depths)
    _largest_by_rate(by_rate, explosions(frames))
    courses = study(frames.courses, "depth")
    for axes, layers in zip(grid[1], depths, strict=False):
        for case, mine in by_case(courses[courses["layers"] == layers]):
            _band(axes, mine, "step", "slope", color=_colour(*case), label=label(*case))
        axes.set(title=f"in training, {layers} layers", xlabel="step")
    for axes in grid.flatten():
        axes.grid(alpha=0.3)
        axes.axhline(1, color="black", linewidth=0.7)
        axes.set(yscale="log", ylim=SLOPES)
    for axes in grid[:, 0]:
        axes.set_ylabel("|dD/dx|")
    for axes in (by_depth, by_scale, by_rate, grid[1, 0]):
        axes.legend(fontsize="x-small")
    _save(figure, path)


def _initial_by_depth(axes: Axes, initial: pd.DataFrame, depths: Sequence[int]) -> None:
    """Draw each variant, and BSSN with other scales dashed."""
    for (norm, scale), mine in by_case(initial):
        default = label(norm, scale) in NAMES.values()
        if default or (norm == "bssn" and scale in SCALED):
            options = {
                "color": _colour(norm, scale),
                "label": label(norm, scale),
                "linestyle": "-" if default else "--",
            }
            _band(axes, mine, "layers", "slope", **options)
    axes.set(title="before training, by depth", xlabel="layers")
    axes.set_xticks(depths)


def _initial_by_scale(axes: Axes, initial: pd.DataFrame, depths: Sequence[int]) -> None:
    """Draw SSN and BSSN against c at each depth; 1 is SN and BSN."""
    for norm in ("ssn", "bssn"):
        mine = initial[initial["norm"].isin((norm, norm.replace("ss", "s")))]
        for layers, style in zip(depths, ("-", "--", ":"), strict=False):
            name = f"{NAMES[norm]}, {layers} layers"
            _band(
                axes, mine[mine["layers"] == layers], "scale", "slope", color=COLOURS[norm], linestyle=style, label=name
            )
    axes.set(title="before training, by scale", xlabel="c", xscale="log")
    axes.set_xticks(ticks := (0.3, 0.7, 1, 2, 4), list(map(str, ticks)))
    axes.minorticks_off()


def _largest_by_rate(axes: Axes, found: pd.DataFrame) -> None:
    """Draw the largest slope of each short training; crosses are runs that diverged."""
    for norm in in_order(list(found["norm"])):
        mine = found[found["norm"] == norm]
        height = mine["slope"].clip(*SLOPES)
        axes.plot(
            mine["rate"].unique(),
            height.groupby(mine["rate"], sort=False).median(),
            color=COLOURS[norm],
            label=NAMES[norm],
        )
        for diverged, marker in ((0, "o"), (1, "x")):
            which = mine["diverged"] == diverged
            axes.scatter(mine["rate"][which], height[which], color=COLOURS[norm], marker=marker, s=18)
    axes.set(title="largest in training, 8 layers; x: diverged", xlabel="learning rate", xscale="log")


def variances(frames: Frames, path: Path) -> None:
    """Claim 2: variances over training by layer, over those of the initialisation that each variant parallels."""
    figure, panels = plt.subplots(1, 4, figsize=(18, 4), layout="constrained", sharey=True)
    for axes, norm in zip(panels, VARIANTS, strict=True):
        mine = frames.variances[frames.variances["norm"] == norm]
        for j, ((layer, fan_in), part) in enumerate(mine.groupby(["layer", "fan_in"], sort=False)):
            _band(axes, part, "step", "ratio", color=f"C{j}", label=f"{layer}: {fan_in} inputs")
        axes.axhline(1, color="black", linewidth=1)
        axes.set(title=f"{NAMES[norm]}: variance / {INITIAL[norm]}", xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
        _plain_labels(axes)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    _save(figure, path)


def operators(frames: Frames, path: Path) -> None:
    """Claim 3: operators over reshaped kernels with the bound, and the slopes at initialisation."""
    figure, (ratios, bars) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    found = frames.layers[frames.layers["operator"].notna()]
    for j, (name, mine) in enumerate(found.groupby("set", sort=False)):
        x, y = mine["operator"] / mine["s_out"], mine["bound"] / mine["s_out"]
        ratios.scatter(x, y, s=18, color=f"C{j}", label=name)
    ends = [0.9, (found["bound"] / found["s_out"]).max()]
    ratios.plot(ends, ends, color="black", linewidth=1, label="operator = bound")
    ratios.set(xlabel="operator / s_out", ylabel="bound / s_out", xscale="log", yscale="log")
    ratios.set_title("Convolution operators, Gaussian kernels")
    ratios.legend(fontsize="small")
    order = list(dict.fromkeys(frames.slopes["norm"]))
    for j, norm in enumerate(order):
        y = frames.slopes[frames.slopes["norm"] == norm]["slope"]
        bars.scatter([j] * len(y), y, s=18, color=COLOURS[norm])
    bars.set_xticks(range(len(order)), [NAMES.get(norm, norm) for norm in order])
    bars.set(title="|dD/dx| at initialisation, the paper's CNN at 32 x 32", yscale="log")
    for axes in (ratios, bars):
        axes.grid(alpha=0.3, which="both")
    _save(figure, path)


def _plain_labels(axes: Axes) -> None:
    """Label a logarithmic axis with numbers, not powers, at 1, 2 and 5 of each decade."""
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")


def _points(axes: Axes, groups: Sequence[tuple[str, pd.DataFrame]]) -> None:
    """Draw the distances of each variant, and their median as a bar, side by side for each group.

    Crosses at the upper edge are runs that diverged.
    """
    everything = pd.concat([frame for _, frame in groups])["frechet"]
    edge = DIVERGED * everything[np.isfinite(everything)].max()
    for j, (_, frame) in enumerate(groups):
        norms = in_order(list(frame["norm"]))
        for i, norm in enumerate(norms):
            y = frame[frame["norm"] == norm]["frechet"]
            x = j + 0.15 * (i - (len(norms) - 1) / 2)
            finite = y[np.isfinite(y)]
            axes.scatter(
                [x] * len(finite), finite, s=14, color=COLOURS[norm], label=NAMES[norm] if j == 0 else None, alpha=0.7
            )
            axes.scatter(
                [x] * (len(y) - len(finite)), [edge] * (len(y) - len(finite)), s=24, color=COLOURS[norm], marker="x"
            )
            axes.plot([x - 0.06, x + 0.06], [min(np.median(y), edge)] * 2, color=COLOURS[norm], linewidth=2)
    axes.set_xticks(range(len(groups)), [name for name, _ in groups])
    axes.set(yscale="log", ylabel="Frechet distance")
    _plain_labels(axes)
    axes.grid(alpha=0.3, axis="y", which="both")
    axes.legend(fontsize="small", ncols=2)


def stability(frames: Frames, profile: Profile, path: Path) -> None:
    """Claim 4: distances over learning rates, and over the scale."""
    figure, (grid, scale) = plt.subplots(1, 2, figsize=(15, 4.5), layout="constrained", width_ratios=(2, 1))
    groups = [
        (f"learning rate {rate:g}" + (f", {critic} critic steps" if critic > 1 else ""), part)
        for (rate, critic), part in all_rates(frames, profile).groupby(["rate", "critic_steps"])
    ]
    _points(grid, groups)
    scaled = all_scales(frames, profile)
    for norm, part in scaled.groupby("norm"):
        found = {c: median_interval(list(same["frechet"])) for c, same in part.groupby("scale")}
        y = np.array([(m.median, m.median - m.low, m.high - m.median) for m in found.values()]).T
        scale.errorbar(list(found), y[0], y[1:], color=COLOURS[norm], label=NAMES[norm], capsize=3, marker="o")
    scale.set(xscale="log", yscale="log", xlabel="scale c", ylabel="Frechet distance, median and 95% interval")
    ticks = sorted(scaled["scale"].unique())
    scale.set_xticks(ticks, [f"{c:.2g}" for c in ticks])
    scale.minorticks_off()
    _plain_labels(scale)
    scale.grid(alpha=0.3, which="both")
    scale.legend()
    _save(figure, path)


def quality(frames: Frames, path: Path) -> None:
    """Claim 5: distances of all seeds by variant and kind of images, and that of other real images as a line."""
    own = study(frames.trainings, "variants")
    kinds = list(dict.fromkeys(own["data"]))
    figure, panels = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 4), squeeze=False, layout="constrained")
    for axes, data in zip(panels[0], kinds, strict=True):
        _points(axes, [(data, own[own["data"] == data])])
        for line in frames.references[frames.references["data"] == data]["frechet"] if len(frames.references) else ():
            axes.axhline(line, color="black", linewidth=1, linestyle=":")
    _save(figure, path)


def samples(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Claim 5: samples of one seed; one row for each of the records."""
    rows = [record["samples"] for record in records]
    pixels = torch.tensor(rows, dtype=torch.float32).flatten(0, 1) / 127.5 - 1
    save_grid(pixels, path, columns=len(rows[0]), pixel_size=2)


def switching(frames: Frames, path: Path) -> None:
    """Draw the switched training: losses on top of each other, their difference in two precisions, and the seconds."""
    found = narrow(frames.switching)
    figure, (losses, single, double, seconds) = plt.subplots(1, 4, figsize=(19, 4), layout="constrained")
    by_precision = dict(list(found.groupby("precision")))
    for loss, colour in (("discriminator", "C0"), ("generator", "C1")):
        s = by_precision["float32"]
        losses.plot(s["step"], s[f"{loss}_torch"], color=colour, label=f"{loss}, torch", linewidth=3, alpha=0.4)
        losses.plot(s["step"], s[f"{loss}_sn"], color="black", label=f"{loss}, sn", linewidth=1, linestyle="--")
        for axes, precision in ((single, "float32"), (double, "float64")):
            s = by_precision[precision]
            for way, style, name in (("sn", "o-", "sn"), ("rounded", ".:", "torch after a rounding error")):
                apart = (s[f"{loss}_{way}"] - s[f"{loss}_torch"]).abs()
                some = apart > 0  # the discriminator's loss is often 0 in both
                axes.plot(s["step"][some], apart[some], style, color=colour, label=f"{loss}: torch and {name}")
            axes.set(title=f"difference of the losses, {precision}", yscale="log", ylim=(1e-17, 10))
    losses.set(title="losses, float32")
    wide = frames.switching[frames.switching["width"] == frames.switching["width"].max()]
    for way, colour in (("torch", "C0"), ("sn", "C3")):
        seconds.plot(wide["step"], wide[f"seconds_{way}"], color=colour, label=way)
    seconds.set(
        title=f"seconds of a step, width {wide['width'].iloc[0]}, batch {wide['batch'].iloc[0]}", ylim=(0, None)
    )
    for axes in (losses, single, double, seconds):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    _save(figure, path)
