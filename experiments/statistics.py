"""Medians over seeds with bootstrap intervals. Infinities count: a diverged run is the worst one, not a missing one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


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
    return f"{x:.0f}" if 100 <= abs(x) < float("inf") else f"{x:.3g}"


def median_interval(values: Sequence[float]) -> Interval:
    """Return the median and its percentile bootstrap interval; raises ValueError without values.

    With five values the interval is nearly their range. NaN counts as infinite.
    """
    if not values:
        raise ValueError("no values")
    x = np.asarray([float("inf") if v != v else v for v in values])
    drawn = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    medians = np.median(x[drawn], axis=1)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(medians, [tail, 1 - tail], method="nearest")
    return Interval(float(np.median(x)), float(low), float(high), len(x))


@dataclass(frozen=True)
class Comparison:
    """Two settings on the same seeds: in how many pairs the first is lower, and the ratio first / second."""

    wins: int
    ratio: Interval


def compare(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare paired positive values; of two infinite ones neither is lower and their ratio is 1."""
    pairs = list(zip(first, second, strict=True))
    ratios = [1.0 if a == b else a / b for a, b in pairs]
    return Comparison(sum(a < b for a, b in pairs), median_interval(ratios))
