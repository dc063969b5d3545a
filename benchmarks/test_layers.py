"""Forward, backward and both of every peer on every set of layers and every point of the grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import pytest

from benchmarks.against.peers import Peer
from benchmarks.shown.results import Results
from benchmarks.timing.clock import EventTimer, clock_for, launches
from benchmarks.timing.record import BOTH, MOVED, Record
from benchmarks.work.devices import is_gpu
from benchmarks.work.problem import Problem

SECONDS_OF_A_SET, SECONDS_OF_A_POINT = 1.0, 0.1  # about so long for each case
FEWEST, MOST = 5, 200  # rounds

Run = Callable[[], None]


@dataclass
class Case:
    """One peer on one set, ready to be timed."""

    benchmark: pytest.FixtureRequest
    part: str
    problem: Problem
    peer_name: str
    peer: Peer
    caches: str
    timer: EventTimer
    copy_seconds: float
    results: Results

    def time(self, phase: str, run: Run, before: Run) -> None:
        """Time `run` by itself, with `before` run before each time; keep a record, and notes in the benchmark."""
        chosen, benchmark = self.problem.set, self.benchmark
        benchmark.group = f"{chosen.name}, {self.problem.variant}, {phase}, {self.caches}"
        start = perf_counter()
        before()
        run()
        seconds = SECONDS_OF_A_SET if self.part == "layers" else SECONDS_OF_A_POINT
        rounds = int(min(max(seconds / (perf_counter() - start), FEWEST), MOST))
        on_gpu = is_gpu(self.problem.device)
        host: list[float] = []
        if on_gpu:
            run, before = self._queued(run, before, host)
        benchmark.pedantic(run, setup=before, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is not None:  # None with --benchmark-disable
            record = Record(
                self.part, chosen.name, self.problem.variant, self.peer_name, phase,
                len(chosen.layers), self.problem.bytes / 1e6, self.caches,
            )  # fmt: skip
            record.fill(benchmark.stats.stats.data, host or None)
            record.copies = record.median / 1e3 / self.copy_seconds
            record.peak_megabytes, record.prepare_seconds = self.peer.peak_megabytes, self.peer.prepare_seconds
            if on_gpu:
                before()
                record.launches = launches(run)
            self.results.merge_phase(record)
            benchmark.extra_info |= notes(record, self.results.machine, self.copy_seconds)
        self.peer.release()

    def _queued(self, run: Run, before: Run, host: list[float]) -> tuple[Run, Run]:
        """Let launches queue up behind a pause of the GPU, and note what the host takes for them."""
        clock = clock_for(self.problem.device, cold=self.caches == "cold")

        def noting_host_time() -> None:
            start = perf_counter()
            run()
            host.append(perf_counter() - start)
            clock.host_took(host[-1])

        def prepare() -> None:
            before()
            self.timer.prepare(clock)

        return noting_host_time, prepare


def notes(record: Record, about: dict[str, object], copy_seconds: float) -> dict[str, object]:
    """Return what pytest-benchmark keeps beside a time: the machine, bytes, rates, memory, launches, host time."""
    peak = about.get("peak_gb_s")
    copied = MOVED["forward"] * record.megabytes / 1e3 / copy_seconds
    return {
        **about,
        **record.to_dict(),
        "bytes_moved": round(MOVED[record.phase] * record.megabytes * 1e6),
        "percent_of_copy": 100 * record.gb_s / copied,
        "percent_of_vendor_peak": 100 * record.gb_s / float(str(peak)) if peak else None,
    }


@pytest.fixture
def case(benchmark, part, problem, peer_name, peer, caches, timer, copy_seconds, results) -> Case:
    return Case(benchmark, part, problem, peer_name, peer, caches, timer, copy_seconds(caches), results)


def test_forward(case: Case) -> None:
    case.time("forward", case.peer.forward, case.peer.release)


def test_backward(case: Case) -> None:
    def prepare() -> None:
        case.peer.release()
        case.peer.forward()

    case.time("backward", case.peer.backward, prepare)


def test_forward_backward(case: Case) -> None:
    def both() -> None:
        case.peer.forward()
        case.peer.backward()

    case.time(BOTH, both, case.peer.release)
