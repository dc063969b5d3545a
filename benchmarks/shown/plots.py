"""Plots of one machine's results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.against.peers import COMPILE, COPY, REDUCE_OVERHEAD, REFERENCE, TORCH
from benchmarks.shown.results import Results
from benchmarks.timing import machine
from benchmarks.timing.record import BOTH, Record
from benchmarks.work.layer_sets import GRID, square
from benchmarks.work.problem import VARIANTS
from benchmarks.work.training_step import GRAPH, NONE

NAMES = {
    "speedup": "How many times as fast, for each model",
    "copies": "Distance to the plain copy, for each model",
    "grid": "Cost against the number of layers and their width",
    "gan": "What normalisation adds to a training step",
}
COLORS = {TORCH: "C0", "foreach": "C1", REFERENCE: "C2", COMPILE: "C4", REDUCE_OVERHEAD: "C5", "torch graph": "C6"}
OUR_COLORS = ("C3", "C9", "C8", "C7", "salmon", "tan")


def save(results: Results, folder: Path) -> list[Path]:
    """Write one PNG for each part that has results."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    drawings: tuple[Callable[[Results], pyplot.Figure | None], ...] = (speedup, copies, grid, gan_steps)
    for name, draw in zip(NAMES, drawings, strict=True):
        figure = draw(results)
        if figure is not None:
            about = f"{machine.title(results.machine)} · {machine.versions(results.machine)}"
            figure.suptitle(f"{NAMES[name]}\n{about}", fontsize=11)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=110, metadata={"Software": None})
            pyplot.close(figure)
            written.append(path)
    return written


def speedup(results: Results) -> pyplot.Figure | None:
    """Forward + backward of each peer in units of ours, per model."""
    if not results.ours():
        return None
    figure, axes = pyplot.subplots(2, 1, figsize=(11, 7.5), layout="constrained")
    ours = results.ours()[0]
    for axis, variant in zip(axes, VARIANTS, strict=True):
        names = results.sets("layers", variant)
        series = {
            peer: [results.speedup("layers", s, variant, BOTH, ours, peer) for s in names]
            for peer in results.peers("layers")
            if peer not in (ours, COPY)
        }
        _ratios(axis, results, variant, series)
        axis.set_ylabel(f"times as long as {ours}\n(log scale)")
        axis.set_title(f"{variant}, forward + backward", fontsize=10)
    return figure


def copies(results: Results) -> pyplot.Figure | None:
    """Forward of everyone in units of the plain copy, per model."""
    if not results.ours():
        return None
    figure, axes = pyplot.subplots(2, 1, figsize=(11, 7.5), layout="constrained")
    for axis, variant in zip(axes, VARIANTS, strict=True):
        names = results.sets("layers", variant)
        series = {}
        for peer in results.peers("layers"):
            found = [results.find("layers", s, variant, peer, "forward") for s in names]
            if peer != COPY:
                series[peer] = [r.copies if r else None for r in found]
        _ratios(axis, results, variant, series)
        axis.axhline(1.5, color="black", linewidth=0.8, linestyle=":")
        axis.set_ylabel("plain copies of the weights\n(log scale)")
        axis.set_title(f"{variant}, forward; dotted: two reads and one write", fontsize=10)
    return figure


def grid(results: Results) -> pyplot.Figure | None:
    """Forward against width, one curve for each number of layers: ours drawn through, torch dashed."""
    kinds = [kind for kind in GRID if results.ours(kind)]
    if not kinds:
        return None
    size = (4.5 * len(kinds) + 2.5, 7.5)
    figure, axes = pyplot.subplots(2, len(kinds), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for column, kind in enumerate(kinds):
        for axis, variant in zip(axes[:, column], VARIANTS, strict=True):
            for color, n in enumerate(GRID[kind][0]):
                for peer, style in ((results.ours(kind)[0], "-o"), (TORCH, "--x")):
                    found = {
                        w: results.find(kind, square(kind, n, w).name, variant, peer, "forward") for w in GRID[kind][1]
                    }
                    points = {w: r for w, r in found.items() if r}
                    label = f"{n} layer{'s' * (n > 1)}, {peer}"
                    axis.plot(list(points), [r.median for r in points.values()], style, color=f"C{color}", label=label)
            name = "3 × 3 convolutions" if kind == "conv" else "linear layers"
            axis.set(xscale="log", yscale="log", xlabel="width (channels in and out)", ylabel="ms")
            axis.set_title(f"{name}, {variant} forward", fontsize=10)
            axis.set_xticks(GRID[kind][1], [str(w) for w in GRID[kind][1]])
            axis.xaxis.set_minor_locator(NullLocator())
            _plain_numbers(axis)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


def gan_steps(results: Results) -> pyplot.Figure | None:
    """Whole training steps: what normalisation adds to them, in per cent, with the medians' 95 % intervals.

    Hatched: captured in a CUDA graph, which is compared with the captured step without normalisation.
    """
    names = results.sets("gan")
    if not names:
        return None
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    cases = dict.fromkeys((r.variant, r.peer) for r in results.records if r.part == "gan" and r.variant != NONE)
    width = 0.8 / max(1, len(cases))
    for j, (variant, peer) in enumerate(cases):
        for i, name in enumerate(names):
            r = results.find("gan", name, variant, peer, "step")
            if r is None or r.added is None:
                continue
            color = ("C0" if peer.startswith(TORCH) else "C3", 0.55 if variant == "sn" else 1)
            x, label = i + (j - (len(cases) - 1) / 2) * width, f"{variant}, {peer}" if i == 0 else None
            hatch = "//" if peer.endswith(GRAPH) else None
            axis.bar(x, r.added, width, color=color, edgecolor="white", hatch=hatch, label=label)
            if r.added_low is not None and r.added_high is not None:
                axis.vlines(x, r.added_low, r.added_high, color="black", linewidth=1)
    steps = {name: results.find("gan", name, NONE, NONE, "step") for name in names}
    axis.set_xticks(range(len(names)), [f"{n}: {_ms(r)} without" for n, r in steps.items()])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_ylabel("% added to a training step")
    axis.grid(axis="y", linewidth=0.4)
    axis.set_axisbelow(True)
    outside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(cases) > 4 else {}  # captured steps too
    axis.legend(fontsize=8, **outside)
    return figure


def _ms(record: Record | None) -> str:
    return f"{record.median:.3g} ms" if record else "?"


def _ratios(axis: pyplot.Axes, results: Results, variant: str, series: dict[str, list[float | None]]) -> None:
    """Draw bars that begin at 1, on a logarithmic axis: up is slower, down faster."""
    series = {label: values for label, values in series.items() if any(values)}
    width = 0.8 / max(1, len(series))
    ours = iter(OUR_COLORS)
    for j, (label, values) in enumerate(series.items()):
        known = [(i, v) for i, v in enumerate(values) if v]
        places = [i + (j - (len(series) - 1) / 2) * width for i, _ in known]
        color = COLORS.get(label) or next(ours, "black")
        axis.bar(places, [v - 1 for _, v in known], width, bottom=1, label=label, color=color)
    names = results.sets("layers", variant)
    sizes = [next((r.megabytes for r in results.records if r.set == name), 0) for name in names]
    axis.set_xticks(range(len(names)), [f"{n}\n{mb:.0f} MB" for n, mb in zip(names, sizes, strict=True)], fontsize=9)
    axis.set_yscale("log")
    axis.axhline(1, color="black", linewidth=0.8)
    _plain_numbers(axis)
    if series:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _plain_numbers(axis: pyplot.Axes) -> None:
    """Label a logarithmic axis with 0.5, 1, 2, 5, 10 instead of powers."""
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", linewidth=0.4)
    axis.set_axisbelow(True)
