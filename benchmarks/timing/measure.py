"""Measurements: peers take turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TypeVar
from unittest.mock import patch

import torch

from benchmarks.against import peers
from benchmarks.timing.clock import CpuClock, CudaClock, Lap, clock_for, launches, peak_memory
from benchmarks.timing.machine import last_level_cache
from benchmarks.timing.record import BOTH, Record, median_interval
from benchmarks.work import training_step
from benchmarks.work.devices import is_gpu
from benchmarks.work.layer_sets import LayerSet
from benchmarks.work.problem import Problem, WrongResultError

FEWEST_ROUNDS, MOST_ROUNDS = 5, 200

MOST_COMPILED = 20
"""torch.compile is left out where the grid has more layers: minutes for each point, and nothing that the sets lack."""

Case = TypeVar("Case", bound=Hashable)


def round_robin(
    runs: dict[Case, Callable[[], Lap]], seconds: float, *, discard: int, keep: int, fewest: int = FEWEST_ROUNDS
) -> dict[Case, list[Lap]]:
    """Let each run several times in turn, for about this many seconds in all.

    At each turn the first `discard` laps, in which the caches fill, do not count; the next `keep` do.
    """
    laps: dict[Case, list[Lap]] = {case: [] for case in runs}
    start = perf_counter()
    for turn in range(MOST_ROUNDS):
        if turn >= fewest and perf_counter() - start > seconds:
            break
        for case, run in runs.items():
            for _ in range(discard):
                run()
            laps[case] += [run() for _ in range(keep)]
    return laps


def peers_for(part: str, chosen: LayerSet, device: torch.device | str) -> list[str]:
    """Return the names of all peers that are timed on a set."""
    few = part == "layers" or len(chosen.layers) <= MOST_COMPILED
    return [name for name in peers.names(device) if few or name not in peers.COMPILED]


def prepare(name: str, problem: Problem, *, empty_cache: bool = True) -> peers.Peer:
    """Return a peer whose first run gave the right results, with what that run took.

    Without `empty_cache` torch.compile may find what it has compiled before, and what that took is not known.

    Raises WrongResultError if the results are not right.
    """
    with _empty_compiler_cache() if name in peers.COMPILED and empty_cache else nullcontext():
        start = perf_counter()
        peer, peak = _first_results(name, problem)
        peer.prepare_seconds = perf_counter() - start
        peer.check(name)
        if name in peers.COMPILED:  # the first run's memory was the compiler's
            peak = peak_memory(peer.first_run, problem.device)
            peer.release()
    peer.peak_megabytes = None if peak is None else peak / 1e6
    return peer


def _first_results(name: str, problem: Problem) -> tuple[peers.Peer, int | None]:
    """Return a peer after its first run, and the memory that this took; for a graph's replays its capture took it."""
    made: list[peers.Peer] = []

    def make() -> None:
        made.append(peers.make(name, problem))

    peak_of_making = peak_memory(make, problem.device) if is_gpu(problem.device) else make()
    peak = peak_memory(made[0].first_run, problem.device)
    return made[0], peak_of_making if name.endswith("graph") else peak


@contextmanager
def _empty_compiler_cache() -> Iterator[None]:
    """Let torch.compile find nothing of earlier processes on the disk: what it takes is what a user waits at first."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        places = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": str(Path(folder, "triton"))}
        with patch.dict(os.environ, places):
            yield


def layer_set(
    part: str,
    chosen: LayerSet,
    variant: str,
    names: Iterable[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seconds: float = 5.0,
    caches: Iterable[str] = ("hot",),
    count_launches: bool = True,
    empty_cache: bool = True,
) -> list[Record]:
    """Check and time all peers on one set, with hot caches, cold ones or both; `seconds` 0 checks only.

    empty_cache: of torch.compile, see `prepare`. On a GPU `count_launches` asks torch's profiler as well, which takes a
    tenth of a second for each peer and phase.
    """
    problem = Problem(chosen, variant, device, dtype)
    new = _records_of(part, problem)
    ready: dict[str, peers.Peer] = {}
    records: list[Record] = []
    for name in names:
        try:
            ready[name] = prepare(name, problem, empty_cache=empty_cache)
            if name in peers.COMPILED and not empty_cache:
                ready[name].prepare_seconds = None
        except WrongResultError as error:
            records.append(new(name, BOTH, error=f"wrong: {error}"))
        except Exception as error:  # a compiler that gives up must not end the others' measurement
            text = str(error).splitlines() or [""]
            records.append(new(name, BOTH, error=f"{type(error).__name__}: {text[0][:200]}"))
    gc.collect()
    for state in caches if seconds else ():
        records += _timed(ready, problem, seconds, partial(new, caches=state), cold=state == "cold")
    if count_launches and is_gpu(device):
        _count_launches(ready, records)
    return records


def launch_counts(
    part: str, chosen: LayerSet, variant: str, names: Iterable[str], *, device: torch.device | str
) -> list[Record]:
    """Return records that have nothing but the number of launches, see `Results.set_launches`.

    For the end of a process: the profiler may stay in the way of all launches after it, and take host time of each.
    """
    problem = Problem(chosen, variant, device)
    new = _records_of(part, problem)
    records: list[Record] = []
    for name in names:
        peer = peers.make(name, problem)
        peer.first_run()
        peer.release()
        own = [new(name, phase) for phase in (*peer.stages, *([BOTH] if len(peer.stages) > 1 else []))]
        _count_launches({name: peer}, own)
        records += own
    return records


def _records_of(part: str, problem: Problem) -> Callable[..., Record]:
    """Return what makes a record of a peer and phase, with what all records of a problem share."""
    dtype = str(problem.dtype).removeprefix("torch.")
    layers, megabytes = len(problem.set.layers), problem.bytes / 1e6
    return partial(Record, part, problem.set.name, problem.variant, layers=layers, megabytes=megabytes, dtype=dtype)


def _timed(
    ready: dict[str, peers.Peer], problem: Problem, seconds: float, new: Callable[..., Record], *, cold: bool
) -> list[Record]:
    """Let peers take turns, and return the records of all phases."""
    records: list[Record] = []
    on_gpu = is_gpu(problem.device)
    beyond_caches = not on_gpu and problem.bytes > (last_level_cache() or 0)
    # On a GPU each lap runs everything twice, and the first time warms up.
    keep, discard, fewest = (1, 0, 7) if on_gpu else (1, 0, FEWEST_ROUNDS) if beyond_caches else (4, 1, FEWEST_ROUNDS)
    cases = [(name, stages) for name, peer in ready.items() for stages in dict.fromkeys((("forward",), peer.stages))]
    runs = {case: partial(_lap, clock_for(problem.device, cold=cold), ready[case[0]], case[1]) for case in cases}
    laps = round_robin(runs, seconds, discard=discard, keep=keep, fewest=fewest)
    for name, stages in cases:
        peer, found = ready[name], laps[name, stages]
        for phase, indices in ({"forward": [0]} if len(stages) == 1 else {"backward": [1], BOTH: [0, 1]}).items():
            record = new(name, phase, peak_megabytes=peer.peak_megabytes, prepare_seconds=peer.prepare_seconds)
            host = [sum(x.host[j] for j in indices) for x in found] if on_gpu else None
            record.fill([sum(x.device[j] for j in indices) for x in found], host, per_turn=keep)
            records.append(record)
    _compare_with_copy(records)
    return records


def _lap(clock: CpuClock | CudaClock, peer: peers.Peer, stages: Sequence[str]) -> Lap:
    lap = clock.lap([getattr(peer, stage) for stage in stages], before=peer.release)
    peer.release()
    return lap


def _count_launches(ready: dict[str, peers.Peer], records: Sequence[Record]) -> None:
    """Set how many kernels, copies and fills each phase of each peer sends to the GPU."""
    counts: dict[tuple[str, str], int] = {}
    for name, peer in ready.items():
        for stage in peer.stages:
            counts[name, stage] = launches(getattr(peer, stage))
        counts[name, BOTH] = sum(counts[name, stage] for stage in peer.stages)
        peer.release()
    for record in records:
        record.launches = counts.get((record.peer, record.phase))


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
    """Check and time whole training steps without normalisation, with torch's and ours; on a GPU also captured."""
    models = training_step.discriminators(kind, device, width)
    if not seconds:
        return []
    on_gpu = is_gpu(device)
    steps: dict[tuple[str, str], Callable[[], None]] = {
        key: training_step.Step(model, batch, device, width or 64) for key, model in models.items()
    }
    peaks: dict[tuple[str, str], int | None] = {}
    if on_gpu:
        peaks = {key: peak_memory(step, device) for key, step in steps.items()}
        for (variant, peer), model in training_step.discriminators(kind, device, width).items():
            key = variant, training_step.captured_name(peer)
            replay = training_step.Replay(training_step.Step(model, batch, device, width or 64, capturable=True))
            peaks[key] = peak_memory(replay.capture, device)
            steps[key] = replay
    runs = {key: partial(clock_for(device).lap, [step]) for key, step in steps.items()}
    for run in runs.values():
        run()
    laps = round_robin(runs, seconds, discard=0, keep=1)
    layers = len(training_step.weight_layers(models[training_step.NONE, training_step.NONE]))
    records = []
    for (variant, peer), found in laps.items():
        record = Record("gan", f"{kind}, batch {batch}", variant, peer, "step", layers, 0.0)
        record.fill([x.device[0] for x in found], [x.host[0] for x in found] if on_gpu else None)
        peak = peaks.get((variant, peer))
        record.peak_megabytes = None if peak is None else peak / 1e6
        plain = laps[training_step.NONE, training_step.without_normalisation(peer)]
        added = [100 * (x.device[0] / p.device[0] - 1) for x, p in zip(found, plain, strict=True)]
        record.added, (record.added_low, record.added_high) = statistics.median(added), median_interval(added)
        records.append(record)
    return records
