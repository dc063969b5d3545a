"""Forward, backward and both of every peer on every set of layers."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from benchmarks.peers import Peer
from benchmarks.problem import Problem

SECONDS, FEWEST, MOST = 1.0, 5, 200  # about so long, and so many rounds, for each case


def test_forward(benchmark, problem: Problem, peer: Peer, copy_seconds: float) -> None:
    _time(benchmark, problem, peer, copy_seconds, "forward", peer.forward, peer.release)


def test_backward(benchmark, problem: Problem, peer: Peer, copy_seconds: float) -> None:
    def prepare() -> None:
        peer.release()
        peer.forward()

    _time(benchmark, problem, peer, copy_seconds, "backward", peer.backward, prepare)


def test_forward_backward(benchmark, problem: Problem, peer: Peer, copy_seconds: float) -> None:
    def both() -> None:
        peer.forward()
        peer.backward()

    _time(benchmark, problem, peer, copy_seconds, "forward + backward", both, peer.release)


def _time(
    benchmark,
    problem: Problem,
    peer: Peer,
    copy_seconds: float,
    phase: str,
    run: Callable[[], None],
    prepare: Callable[[], None],
) -> None:
    benchmark.group = f"{problem.set.name}, {problem.variant}, {phase}"
    start = perf_counter()
    prepare()
    run()
    rounds = int(min(max(SECONDS / (perf_counter() - start), FEWEST), MOST))
    benchmark.pedantic(run, setup=prepare, rounds=rounds, warmup_rounds=1)
    peer.release()
    benchmark.extra_info |= peer.about
    if benchmark.stats is not None:  # None with --benchmark-disable
        median = benchmark.stats.stats.median
        benchmark.extra_info["gb_s"] = 2 * problem.bytes / median / 1e9
        benchmark.extra_info["percent_of_copy"] = 100 * copy_seconds / median
        vendor = peer.about.get("peak_gb_s")
        if vendor:
            benchmark.extra_info["percent_of_vendor_peak"] = 100 * benchmark.extra_info["gb_s"] / vendor
