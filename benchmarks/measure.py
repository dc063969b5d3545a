"""Measurements: peers take turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import TypeVar

import torch

from benchmarks import gan, peers
from benchmarks.clock import CpuClock, CudaClock, Lap, clock_for, launches, peak_memory
from benchmarks.layer_sets import LayerSet
from benchmarks.machine import last_level_cache
from benchmarks.problem import Problem, WrongResultError

BOTH = "forward + backward"
FEWEST_ROUNDS, MOST_ROUNDS = 5, 200

Case = TypeVar("Case", bound=Hashable)


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
    runs: int = 0
    median: float | None = None
    q10: float | None = None
    q90: float | None = None
    fastest: float | None = None
    host: float | None = None  # median until the last launch has returned; None on a CPU
    copies: float | None = None  # median in units of the plain copy's
    gb_s: float | None = None  # reading the weights once and writing as much, per second
    peak_megabytes: float | None = None  # memory that one forward and backward takes at most, beyond the weights
    launches: int | None = None
    added: float | None = None  # of a training step: per cent more than without normalisation in the same turn, median
    error: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return self.part, self.set, self.variant, self.peer, self.phase, self.caches

    def to_dict(self) -> dict[str, object]:
        """Return all fields; floats with five digits."""
        return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in asdict(self).items()}


def round_robin(
    runs: dict[Case, Callable[[], Lap]], seconds: float, *, discard: int, keep: int
) -> dict[Case, list[Lap]]:
    """Let each run several times in turn, for about this many seconds in all.

    At each turn the first `discard` laps, in which the caches fill, do not count; the next `keep` do.
    """
    laps: dict[Case, list[Lap]] = {case: [] for case in runs}
    start = perf_counter()
    for turn in range(MOST_ROUNDS):
        if turn >= FEWEST_ROUNDS and perf_counter() - start > seconds:
            break
        for case, run in runs.items():
            for _ in range(discard):
                run()
            laps[case] += [run() for _ in range(keep)]
    return laps


def _fill(record: Record, device: Sequence[float], host: Sequence[float] | None) -> None:
    ms = sorted(1e3 * s for s in device)
    deciles = statistics.quantiles(ms, n=10, method="inclusive") if len(ms) > 1 else ms * 9
    record.runs, record.median, record.fastest = len(ms), statistics.median(ms), ms[0]
    record.q10, record.q90 = deciles[0], deciles[-1]
    record.gb_s = 2 * record.megabytes / record.median if record.megabytes else None
    if host is not None:
        record.host = 1e3 * statistics.median(host)


def layer_set(
    part: str,
    chosen: LayerSet,
    variant: str,
    names: Iterable[str],
    *,
    device: torch.device | str = "cpu",
    seconds: float = 5.0,
    cold: bool = False,
) -> list[Record]:
    """Check and time all peers on one set; `seconds` 0 checks only."""
    problem = Problem(chosen, variant, device)
    new = partial(Record, part, chosen.name, variant, layers=len(chosen.layers), megabytes=problem.bytes / 1e6)
    clock = clock_for(device, cold=cold)
    ready: dict[str, peers.Peer] = {}
    records: list[Record] = []
    memory: dict[str, float | None] = {}
    for name in names:
        try:
            peer = peers.make(name, problem)
            peak = peak_memory(peer.first_run, device)
            peer.check(name)
            if name in peers.COMPILED:  # the first run's memory was the compiler's
                peak = peak_memory(peer.first_run, device)
                peer.release()
        except WrongResultError as error:
            records.append(new(name, BOTH, error=f"wrong: {error}"))
            continue
        except Exception as error:  # a compiler that gives up must not end the others' measurement
            records.append(new(name, BOTH, error=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"))
            continue
        ready[name], memory[name] = peer, peak and peak / 1e6
    gc.collect()
    if not seconds:
        return records
    large = problem.bytes > (last_level_cache() or 0)
    cases = [(name, stages) for name, peer in ready.items() for stages in dict.fromkeys((("forward",), peer.stages))]
    runs = {case: partial(_lap, clock, ready[case[0]], case[1]) for case in cases}
    laps = round_robin(runs, seconds, discard=0 if large else 1, keep=1 if large else 4)
    for name, stages in cases:
        phases = {"forward": [0]} if len(stages) == 1 else {"backward": [1], BOTH: [0, 1]}
        found = laps[name, stages]
        counts = _launches(ready[name], stages) if isinstance(clock, CudaClock) else None
        for phase, indices in phases.items():
            record = new(name, phase, caches="cold" if cold else "hot", peak_megabytes=memory[name])
            host = None if isinstance(clock, CpuClock) else [sum(x.host[j] for j in indices) for x in found]
            _fill(record, [sum(x.device[j] for j in indices) for x in found], host)
            record.launches = counts and sum(counts[j] for j in indices)
            records.append(record)
    _compare_with_copy(records)
    return records


def _lap(clock: CpuClock | CudaClock, peer: peers.Peer, stages: Sequence[str]) -> Lap:
    lap = clock.lap([getattr(peer, stage) for stage in stages])
    peer.release()
    return lap


def _launches(peer: peers.Peer, stages: Sequence[str]) -> list[int]:
    counts = [launches(getattr(peer, stage)) for stage in stages]
    peer.release()
    return counts


def _compare_with_copy(records: list[Record]) -> None:
    copy = next((r.median for r in records if r.peer == peers.COPY), None)
    for record in records:
        if copy and record.median:
            record.copies = record.median / copy


def gan_steps(
    kind: str,
    *,
    device: torch.device | str = "cpu",
    batch: int,
    seconds: float = 20.0,
    width: int | None = None,
) -> list[Record]:
    """Check and time whole training steps without normalisation, with torch's and with ours."""
    clock = clock_for(device)
    models = gan.discriminators(kind, device, width)
    if not seconds:
        return []
    steps = {key: gan.GanStep(model, batch, device, width or 64) for key, model in models.items()}
    runs = {key: partial(clock.lap, [step]) for key, step in steps.items()}
    for run in runs.values():
        run()
    laps = round_robin(runs, seconds, discard=0, keep=1)
    records = []
    for (variant, peer), found in laps.items():
        layers = len(gan.weight_layers(models[variant, peer]))
        record = Record("gan", f"{kind}, batch {batch}", variant, peer, "step", layers, 0.0)
        host = None if isinstance(clock, CpuClock) else [x.host[0] for x in found]
        _fill(record, [x.device[0] for x in found], host)
        plain = laps[gan.NONE, gan.NONE]
        record.added = 100 * statistics.median(x.device[0] / p.device[0] - 1 for x, p in zip(found, plain, strict=True))
        records.append(record)
    return records
