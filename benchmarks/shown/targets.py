"""What speed this project aims at on a CPU with two threads, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import geometric_mean

from benchmarks.against.peers import COMPILE, COPY, OURS, REFERENCE, TORCH
from benchmarks.shown.results import Results
from benchmarks.timing.record import BOTH, Record
from benchmarks.work.layer_sets import square

CPU = f"{OURS} cpu"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """One aim: `aim` and `found` as text."""

    what: str
    aim: str
    found: str
    holds: bool


def targets(results: Results) -> list[Target]:
    """Return the aims of the CPU backend with what these results say of them; none for results of a GPU."""
    if results.kind != "cpu":
        return []
    return [
        *_speedups(results, "bssn", "forward", REFERENCE, least=5, mean=12),
        *_speedups(results, "bssn", BOTH, REFERENCE, mean=6),
        *_speedups(results, "sn", "forward", TORCH, least=3, mean=5),
        *_speedups(results, "sn", "backward", TORCH, least=2),
        *_speedups(results, "sn", BOTH, TORCH, mean=4),
        *_speedups(results, "sn", BOTH, COMPILE, mean=3),
        never_slower(results),
        *_copies(results, most=1.6),
        *_host(results, least=10),
    ]


def _speedups(
    results: Results, variant: str, phase: str, peer: str, *, least: float | None = None, mean: float | None = None
) -> Iterator[Target]:
    names = results.sets("layers", variant)
    known = {s: results.speedup("layers", s, variant, phase, CPU, peer) for s in names}
    known = {s: x for s, x in known.items() if x}
    complete = 0 < len(known) == len(names)
    some = "" if complete else f"; {len(known)} of {len(names)} models"
    what = f"`{variant}` {phase}, times as fast as {peer}"
    # What bounds a forward pass.
    copies = [results.speedup("layers", s, variant, phase, COPY, peer) or 0 for s in known if phase == "forward"]
    if least is not None:
        worst = min(known, key=known.__getitem__, default="")
        text = f"{known[worst]:.1f} ({worst}{some})" if known else NOT_MEASURED
        text += f"; a plain copy {min(copies):.1f}" if copies and all(copies) else ""
        yield Target(f"{what}, every model", f"≥ {least:g}", text, complete and known[worst] >= least)
    if mean is not None:
        x = geometric_mean(known.values()) if known else 0
        text = f"{x:.1f}{some}" if known else NOT_MEASURED
        text += f"; a plain copy {geometric_mean(copies):.1f}" if copies and all(copies) else ""
        yield Target(f"{what}, geometric mean", f"≥ {mean:g}", text, complete and x >= mean)


def never_slower(results: Results) -> Target:
    """Compare with every peer on every model and point of the grid, forward, backward and both.

    Two medians differ where their 95 % intervals do not overlap; otherwise the runs cannot tell which is the lower.
    """
    timed = {r.key: r for r in results.records if r.median is not None and r.part != "gan"}
    slower, close, count = {}, 0, 0
    for r in timed.values():
        ours = timed.get((r.part, r.set, r.variant, CPU, r.phase, r.caches, r.dtype))
        if ours is None or r.peer == COPY or r.peer.startswith(OURS):
            continue
        count += 1
        (low, high), (their_low, their_high) = _interval(ours), _interval(r)
        if low > their_high:
            slower[f"{r.peer} on {r.set}, `{r.variant}` {r.phase}"] = r.median / ours.median
        close += low <= their_high and their_low <= high
    text = f"{len(slower)} of {count} ({close} too close to tell)" if count else NOT_MEASURED
    if slower:
        worst = min(slower, key=slower.__getitem__)
        text += f"; worst {slower[worst]:.2f} times as fast as {worst}"
    what = "comparisons with any peer, on any model or point of the grid, in which ours is slower"
    return Target(what, "0", text, bool(count) and not slower)


def _interval(record: Record) -> tuple[float, float]:
    known = record.low is not None and record.high is not None
    return (record.low, record.high) if known else (record.median, record.median)


def _copies(results: Results, *, most: float) -> Iterator[Target]:
    cache = results.machine.get("cache")
    for variant in ("sn", "bssn"):
        for name in results.sets("layers", variant):
            r = results.find("layers", name, variant, CPU, "forward")
            if r and cache and r.megabytes * 1e6 > int(str(cache)):
                what = f"`{variant}` forward in plain copies, {name}, beyond the last-level cache"
                yield Target(what, f"≤ {most:g}", f"{r.copies:.2f}", r.copies <= most)


def _host(results: Results, *, least: float) -> Iterator[Target]:
    name = square("linear", 20, 4).name
    for variant in ("sn", "bssn"):
        for phase in ("forward", BOTH):
            x = results.speedup("linear", name, variant, phase, CPU, TORCH)
            what = f"host overhead: 20 layers of 4×4 weights, `{variant}` {phase}, part of torch's time"
            yield Target(what, f"≤ 1/{least:g}", f"1/{x:.1f}" if x else NOT_MEASURED, bool(x and x >= least))
