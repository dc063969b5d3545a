"""Plots of the results."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.gan import NONE
from benchmarks.layer_sets import GRID, square
from benchmarks.measure import BOTH
from benchmarks.peers import COPY, TORCH
from benchmarks.results import Results

VARIANTS = ("sn", "bssn")


def save(results: Results, folder: Path) -> list[Path]:
    """Write one PNG for each part that has results."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in (("speedup", speedup), ("copies", copies), ("grid", grid), ("gan", gan_steps)):
        figure = draw(results)
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=110, metadata={"Software": None})
            pyplot.close(figure)
            written.append(path)
    return written


def speedup(results: Results) -> pyplot.Figure | None:
    """Forward + backward of each peer in units of ours, per model."""
    if not results.ours():
        return None
    figure, axes = pyplot.subplots(2, 1, figsize=(11, 7), layout="constrained")
    ours = results.ours()[0]
    for axis, variant in zip(axes, VARIANTS, strict=True):
        series = {
            peer: [
                results.speedup("layers", s, variant, BOTH, ours, peer) or 0 for s in results.sets("layers", variant)
            ]
            for peer in results.peers("layers")
            if peer not in (ours, COPY)
        }
        _bars(axis, results.sets("layers", variant), {k: v for k, v in series.items() if any(v)})
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel("time in units of ours")
        axis.set_title(f"{variant}, forward + backward: {ours} against others")
    return figure


def copies(results: Results) -> pyplot.Figure | None:
    """Forward of everyone in units of the plain copy, per model."""
    if not results.ours():
        return None
    figure, axes = pyplot.subplots(2, 1, figsize=(11, 7), layout="constrained")
    for axis, variant in zip(axes, VARIANTS, strict=True):
        names = results.sets("layers", variant)
        series = {}
        for peer in results.peers("layers"):
            found = [results.find("layers", s, variant, peer, "forward") for s in names]
            if peer != COPY and any(found):
                series[peer] = [r.copies if r else 0 for r in found]
        _bars(axis, names, series)
        axis.set_yscale("log")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel("plain copies")
        axis.set_title(f"{variant}, forward: distance to the plain copy of the weights")
    return figure


def grid(results: Results) -> pyplot.Figure | None:
    """Forward against width, one curve for each number of layers: ours drawn through, torch dashed."""
    kinds = [kind for kind in GRID if results.ours(kind)]
    if not kinds:
        return None
    figure, axes = pyplot.subplots(
        2, len(kinds), figsize=(4.5 * len(kinds) + 2.5, 7), layout="constrained", squeeze=False
    )
    for column, kind in enumerate(kinds):
        for axis, variant in zip(axes[:, column], VARIANTS, strict=True):
            for color, n in enumerate(GRID[kind][0]):
                for peer, style in ((results.ours(kind)[0], "-o"), (TORCH, "--x")):
                    found = {
                        w: results.find(kind, square(kind, n, w).name, variant, peer, "forward") for w in GRID[kind][1]
                    }
                    points = {w: r.median for w, r in found.items() if r}
                    label = f"{n} layers, {peer}"
                    axis.plot(list(points), list(points.values()), style, color=f"C{color}", label=label)
            axis.set(xscale="log", yscale="log", xlabel="width", ylabel="ms", title=f"{kind} layers, {variant} forward")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


def gan_steps(results: Results) -> pyplot.Figure | None:
    """Whole training steps: what normalisation adds to them, in per cent."""
    names = results.sets("gan")
    if not names:
        return None
    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    cases = dict.fromkeys((r.variant, r.peer) for r in results.records if r.part == "gan" and r.variant != NONE)
    series = {}
    for variant, peer in cases:
        found = [results.find("gan", name, variant, peer, "step") for name in names]
        series[f"{variant}, {peer}"] = [r.added if r and r.added is not None else 0 for r in found]
    _bars(axis, names, series)
    axis.set_ylabel("% added to a training step")
    axis.set_title("cost of normalisation in whole training steps")
    return figure


def _bars(axis: pyplot.Axes, groups: list[str], series: dict[str, list[float]]) -> None:
    width = 0.8 / max(1, len(series))
    for j, (label, values) in enumerate(series.items()):
        axis.bar([i + (j - (len(series) - 1) / 2) * width for i in range(len(groups))], values, width, label=label)
    axis.set_xticks(range(len(groups)), groups)
    axis.legend(fontsize=8)
    axis.grid(axis="y", linewidth=0.4)
    axis.set_axisbelow(True)
