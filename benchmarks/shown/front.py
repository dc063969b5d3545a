"""The README's chart and the sentence below it, from one machine's results on a CPU."""

from __future__ import annotations

from pathlib import Path
from statistics import geometric_mean

from matplotlib import pyplot

from benchmarks.against.peers import COPY, TORCH
from benchmarks.shown.markdown import replace
from benchmarks.shown.results import Results
from benchmarks.timing import machine
from benchmarks.timing.record import BOTH

ROOT = Path(__file__).parents[2]
CHART = "docs/images/speed.png"
OUR_COLOR, TORCH_COLOR, LIMIT_COLOR = "C3", "C0", "black"


def renew(results: Results, root: Path = ROOT) -> None:
    """Draw the chart, and write the sentence into the README; raises ValueError if it has no place for it."""
    figure = draw(results)
    figure.savefig(root / CHART, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    replace(root / "README.md", "results: front", sentence(results))


def draw(results: Results) -> pyplot.Figure:
    """Left: `sn` forward of each model in per cent of torch's time, with a plain copy. Right: whole training steps."""
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 3.8), layout="constrained", gridspec_kw={"width_ratios": [2, 1]}
    )
    ours, copy = (
        {name: 100 / times for name, times in _times_as_fast(results, "forward", what).items()} for what in (None, COPY)
    )
    names = sorted(ours, key=lambda name: -ours[name])
    rows = range(len(names))
    left.barh(rows, [100] * len(names), 0.8, color=TORCH_COLOR, label="torch's spectral_norm")
    left.barh(rows, [ours[name] for name in names], 0.5, color=OUR_COLOR, label="bssn_fast")
    left.barh(
        rows, [copy[name] for name in names], 0.2, color=LIMIT_COLOR, label="a plain copy of the weights: the limit"
    )
    left.set_yticks(rows, names)
    left.set(xlabel="% of the time of torch's spectral_norm", title="Time to normalise a model's weights: sn, forward")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=3)

    added = _added(results)
    for j, color in enumerate((TORCH_COLOR, OUR_COLOR)):
        places = [i + (j - 0.5) * 0.4 for i in range(len(added))]
        right.bar(places, [pair[j] for pair in added.values()], 0.4, color=color)
    right.set_xticks(range(len(added)), [name.partition(",")[0] for name in added])
    right.set(ylabel="% added to the step", xlabel="discriminator", title="Added to a GAN's step: sn")
    for axis, direction in ((left, "x"), (right, "y")):
        axis.grid(axis=direction, linewidth=0.4)
        axis.set_axisbelow(True)
    about = f"{machine.title(results.machine)} · {machine.versions(results.machine)}"
    figure.supxlabel(about, fontsize=8)
    return figure


def sentence(results: Results) -> str:
    """Return what the chart shows, in numbers."""
    faster, both = _times_as_fast(results, "forward"), _times_as_fast(results, BOTH)
    limit = geometric_mean(_times_as_fast(results, "forward", COPY).values())
    steps = " and ".join(
        f"{ours:.0f} % with a {name.partition(',')[0]} discriminator (torch's adds {torchs:.0f} %)"
        for name, (torchs, ours) in _added(results).items()
    )
    return (
        f"On {machine.title(results.machine)}, over the layers of {len(faster)} published models, `sn` is "
        f"{geometric_mean(both.values()):.1f} times as fast as torch's `spectral_norm`, forward and backward together "
        f"(geometric mean). The forward pass alone is {min(faster.values()):.1f} to {max(faster.values()):.1f} times "
        f"as fast, {geometric_mean(faster.values()):.1f} in the mean; a plain copy of the weights, which is the limit, "
        f"would be {limit:.1f} times as fast. "
        f"It adds to a GAN's whole training step {steps}."
    )


def _times_as_fast(results: Results, phase: str, what: str | None = None) -> dict[str, float]:
    """Return for each model how many times as fast as torch we are, or a plain copy, for `sn`."""
    name = what or results.ours()[0]
    found = {s: results.speedup("layers", s, "sn", phase, name, TORCH) for s in results.sets("layers", "sn")}
    return {name: times for name, times in found.items() if times}


def _added(results: Results) -> dict[str, tuple[float, float]]:
    """Return for each discriminator the per cent that torch's and our `sn` add to a training step."""
    ours = next(r.peer for r in results.records if r.part == "gan" and r.peer.startswith("bssn_fast"))
    found = {}
    for name in results.sets("gan"):
        torchs, mine = (results.find("gan", name, "sn", peer, "step") for peer in (TORCH, ours))
        if torchs and mine and torchs.added is not None and mine.added is not None:
            found[name] = torchs.added, mine.added
    return found
