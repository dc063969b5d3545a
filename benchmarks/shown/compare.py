"""Compare two sets of results, so that a regression is visible."""

from __future__ import annotations

from statistics import geometric_mean

from benchmarks.against.peers import COPY, OURS
from benchmarks.shown.results import Results

TOLERATED = 1.25
"""A case that takes this many times as long as before is a regression, and named."""
WORTH_A_LOOK_MS = 0.02
"""Changes of shorter times are those of the machine's timer."""


def ratios(old: Results, new: Results) -> dict[str, float]:
    """Return time now by time before of each of our own cases.

    Where the same runs timed another peer of torch's as well, the machine's own change is divided out: it is the
    geometric mean of how those changed. What changed by less than the timer's noise stays at 1: with the drift divided
    out it could become a change again.
    """
    before = {r.key: r for r in old.records if r.median is not None}
    ours: dict[tuple[str, ...], list[tuple[str, float | None]]] = {}
    others: dict[tuple[str, ...], list[float]] = {}
    for r in new.records:
        was = before.get(r.key)
        if was is None or r.median is None or was.median is None:
            continue
        case = (r.part, r.set, r.variant, r.caches)
        ratio = r.median / was.median
        if r.peer.startswith(OURS):
            is_noise = abs(r.median - was.median) < WORTH_A_LOOK_MS
            name = f"{r.set} {r.variant} {r.phase} {r.peer}"
            ours.setdefault(case, []).append((name, None if is_noise else ratio))
        elif r.peer != COPY:
            others.setdefault(case, []).append(ratio)
    found = {}
    for case, timed in ours.items():
        drift = geometric_mean(others[case]) if case in others else 1.0
        found |= {name: 1.0 if ratio is None else ratio / drift for name, ratio in timed}
    return found


def print_comparison(old: Results, new: Results) -> int:
    """Print what changed, and return 1 if something became slower."""
    found = ratios(old, new)
    if not found:
        print("the two have no case of bssn_fast in common")
        return 1
    slower = {name: x for name, x in found.items() if x > TOLERATED}
    faster = {name: x for name, x in found.items() if x < 1 / TOLERATED}
    for title, cases in (("slower", slower), ("faster", faster)):
        for name, x in sorted(cases.items(), key=lambda item: -item[1]):
            print(f"{title}: {name}: {x:.2f} times the time of before")
    print(f"{len(found)} cases: {geometric_mean(found.values()):.3f} times the time of before in the geometric mean")
    return int(bool(slower))
