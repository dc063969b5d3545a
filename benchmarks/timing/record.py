"""Figures of one case, and how they come from the times of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from scipy.stats import quantile_test

BOTH = "forward + backward"
MOVED = {"forward": 2, "backward": 3, BOTH: 5}
"""How often a phase must at least move as many bytes as the weights have: forward reads W and writes the normalised
weight, backward reads the gradient and W and writes dW. The plain copy, which counts as a forward, moves two."""


@dataclass
class Record:
    """Figures of one phase of one peer. Times in milliseconds; `error` instead of times where a peer failed."""

    part: str  # "layers", "linear" or "conv" of the grid, "gan"
    set: str
    variant: str
    peer: str
    phase: str
    layers: int
    megabytes: float  # of the weights
    caches: str = "hot"
    dtype: str = "float32"  # of the weights
    runs: int = 0
    median: float | None = None
    low: float | None = None  # 95 % interval of the median
    high: float | None = None
    q10: float | None = None
    q90: float | None = None
    fastest: float | None = None
    host: float | None = None  # median until the last launch has returned; None on a CPU
    copies: float | None = None  # median in units of the plain copy's
    gb_s: float | None = None  # bytes that must at least be moved (see MOVED) per second
    peak_megabytes: float | None = None  # memory that one forward and backward takes at most, beyond the weights
    launches: int | None = None
    prepare_seconds: float | None = None  # once, until the first result: compiling, capturing, allocating
    added: float | None = None  # of a training step: per cent more than without normalisation in the same turn, median
    added_low: float | None = None  # 95 % interval of `added`
    added_high: float | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return self.part, self.set, self.variant, self.peer, self.phase, self.caches, self.dtype

    def fill(self, device: Sequence[float], host: Sequence[float] | None = None, *, per_turn: int = 1) -> None:
        """Set all that follows from the seconds of the runs; consecutive `per_turn` of them belong to one turn."""
        ms = [1e3 * s for s in device]
        ordered = sorted(ms)
        deciles = statistics.quantiles(ms, n=10, method="inclusive") if len(ms) > 1 else ms * 9
        self.runs, self.median, self.fastest = len(ms), statistics.median(ms), ordered[0]
        self.q10, self.q90 = deciles[0], deciles[-1]
        # Runs of one turn resemble each other: only turns count as independent.
        turns = [statistics.median(ms[j : j + per_turn]) for j in range(0, len(ms), per_turn)]
        self.low, self.high = median_interval(turns)
        if self.megabytes:
            self.gb_s = MOVED[self.phase] * self.megabytes / self.median
        if host is not None:
            self.host = 1e3 * statistics.median(host)

    def to_dict(self) -> dict[str, object]:
        """Return all fields; floats with five digits."""
        return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in asdict(self).items()}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the values between which the median lies with a probability of 95 %, whatever the distribution.

    Fewer than six values cannot say that of any interval: theirs is all of them.
    """
    if len(values) < 6:
        return min(values), max(values)
    interval = quantile_test(values, q=0.5).confidence_interval(0.95)
    return float(interval.low), float(interval.high)
