"""What is demanded of the speed on a CPU with two threads, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.layer_sets import GRID, square
from benchmarks.measure import BOTH
from benchmarks.peers import COPY, OURS, REFERENCE, TORCH
from benchmarks.results import Results, geometric_mean

COMPILE = "torch.compile"
CPU = f"{OURS} cpu"


@dataclass(frozen=True)
class Target:
    """One demand: `demanded` and `found` as text."""

    what: str
    demanded: str
    found: str
    holds: bool


def targets(results: Results) -> list[Target]:
    """Return the demands that these results can answer: those on the CPU backend."""
    found = [
        *_speedups(results, "bssn", "forward", REFERENCE, least=5, mean=12),
        *_speedups(results, "bssn", BOTH, REFERENCE, mean=6),
        *_speedups(results, "sn", "forward", TORCH, least=3, mean=5),
        *_speedups(results, "sn", "backward", TORCH, least=2),
        *_speedups(results, "sn", BOTH, TORCH, mean=4),
        *_speedups(results, "sn", BOTH, COMPILE, mean=3),
        *_never_slower(results),
        *_copies(results, most=1.6),
        *_host(results, least=10),
    ]
    return found


def _speedups(
    results: Results, variant: str, phase: str, peer: str, *, least: float | None = None, mean: float | None = None
) -> Iterator[Target]:
    known = {s: results.speedup("layers", s, variant, phase, CPU, peer) for s in results.sets("layers", variant)}
    known = {s: x for s, x in known.items() if x}
    if not known:
        return
    what = f"`{variant}` {phase}, times as fast as {peer}"
    if least is not None:
        worst = min(known, key=known.__getitem__)
        text = f"{known[worst]:.1f} ({worst})"
        yield Target(f"{what}, every model", f"≥ {least:g}", text, known[worst] >= least)
    if mean is not None:
        x = geometric_mean(known.values())
        yield Target(f"{what}, geometric mean", f"≥ {mean:g}", f"{x:.1f}", x >= mean)


def _never_slower(results: Results) -> Iterator[Target]:
    found = {}
    for part in ("layers", *GRID):
        for r in results.records:
            if r.part == part and r.peer not in (COPY, CPU) and r.caches == "hot":
                x = results.speedup(part, r.set, r.variant, r.phase, CPU, r.peer)
                if x:
                    found[f"{r.peer} on {r.set}, `{r.variant}` {r.phase}"] = x
    if found:
        worst = min(found, key=found.__getitem__)
        text = f"{found[worst]:.2f} ({worst})"
        yield Target("times as fast as any peer on any model or point of the grid", "≥ 1", text, found[worst] >= 1)


def _copies(results: Results, *, most: float) -> Iterator[Target]:
    cache = results.machine.get("cache")
    for name in results.sets("layers", "bssn"):
        r = results.find("layers", name, "bssn", CPU, "forward")
        if r and cache and r.megabytes * 1e6 > int(str(cache)):
            yield Target(f"`bssn` forward in plain copies, {name}", f"≤ {most:g}", f"{r.copies:.2f}", r.copies <= most)


def _host(results: Results, *, least: float) -> Iterator[Target]:
    name = square("linear", 20, 4).name
    for variant in ("sn", "bssn"):
        for phase in ("forward", BOTH):
            x = results.speedup("linear", name, variant, phase, CPU, TORCH)
            if x:
                what = f"host overhead: 20 layers of 4×4 weights, `{variant}` {phase}, part of torch's time"
                yield Target(what, f"≤ 1/{least:g}", f"1/{x:.1f}", x >= least)
