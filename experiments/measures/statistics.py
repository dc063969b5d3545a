"""Medians over seeds with bootstrap intervals. Infinities count: a diverged run is the worst one, not a missing one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 10_000
LEVEL = 0.95
HUGE = 1e150
"""Stands for infinity within scipy, which interpolates between resamples and squares them."""
INFINITE = HUGE**0.1
"""From here on numbers are infinite: geometric means of several pairs, of which one is, exceed it too."""


@dataclass(frozen=True)
class Interval:
    """A median, the ends of its 95% bootstrap interval, and how many values it is of."""

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{_short(self.median)} [{_short(self.low)}, {_short(self.high)}]"


def _short(x: float) -> str:
    return f"{x:.0f}" if 100 <= abs(x) < 1e5 else f"{x:.3g}"


def median_interval(values: Sequence[float]) -> Interval:
    """Return the median and its percentile bootstrap interval; raises ValueError without values.

    With five values the interval is nearly their range. NaN counts as infinite.
    """
    x = np.nan_to_num(np.asarray(values, dtype=float), nan=HUGE, posinf=HUGE)
    if not len(x):
        raise ValueError("no values")
    if len(x) == 1:
        low = high = x[0]
    else:
        found = bootstrap(
            (x,), np.median, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=0
        ).confidence_interval
        low, high = found.low, found.high
    return Interval(_known(np.median(x)), _known(low), _known(high), len(x))


def _known(x: float) -> float:
    """Return what stands for infinity as infinity, and one over it as 0."""
    return float("inf") if x > INFINITE else 0.0 if 0 < x < 1 / INFINITE else float(x)


@dataclass(frozen=True)
class Comparison:
    """Two settings on the same seeds: in how many pairs the first is lower, and the ratio first / second."""

    wins: int
    pairs: int
    ratio: Interval
    """Over seeds: of pairs that share one the geometric mean is taken first, as they are not independent."""


def compare(first: Sequence[float], second: Sequence[float], seeds: Sequence[int]) -> Comparison:
    """Compare paired positive values; of two infinite ones neither is lower and their ratio is 1."""
    a, b = (np.nan_to_num(np.asarray(x, dtype=float), nan=HUGE, posinf=HUGE) for x in (first, second))
    if not len(a) == len(b) == len(seeds):
        raise ValueError(f"pairs and seeds differ in number: {len(a)}, {len(b)}, {len(seeds)}")
    logs = np.log(a) - np.log(b)
    by_seed = [logs[np.asarray(seeds) == seed].mean() for seed in sorted(set(seeds))]
    return Comparison(int((a < b).sum()), len(a), median_interval(list(np.exp(by_seed))))
