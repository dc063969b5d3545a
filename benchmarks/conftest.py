"""`pytest benchmarks/ --benchmark-only`: each peer by itself, with pytest-benchmark's statistics.

pytest-benchmark times one case after another, so a busy minute meets one peer and not the next. Ratios to be published
come from `python -m benchmarks.report`, where the same peers, checked in the same way, take turns. Both fill the same
records: at its end this suite prints the same aims and measurements, and --report-to writes the same report.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import report
from benchmarks.against import peers
from benchmarks.shown.results import Results
from benchmarks.timing import machine, measure
from benchmarks.timing.clock import EventTimer, clock_for
from benchmarks.work import layer_sets, training_step
from benchmarks.work.networks import DISCRIMINATORS
from benchmarks.work.problem import VARIANTS, Problem

RESULTS = pytest.StashKey[Results]()
TIMER = pytest.StashKey[EventTimer]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bssn_fast")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--threads", type=int, default=torch.get_num_threads(), help="CPU threads, on as many cores")
    group.addoption("--quick", action="store_true", help="only small layers and networks, and nothing compiled")
    group.addoption("--report-to", type=Path, help="folder to write JSON, CSV, plots and report.md to")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quick"):
        torch.set_num_threads(1)  # which waits for no other process
    else:
        machine.pin_threads(config.getoption("threads"))
    config.stash[RESULTS] = Results(machine.describe(config.getoption("device")))
    config.stash[TIMER] = EventTimer()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("device") == "cuda":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=config.stash[TIMER]))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick, device = metafunc.config.getoption("quick"), metafunc.config.getoption("device")
    if "problem" in metafunc.fixturenames:
        cases = [case for part in report.SET_PARTS for case in _cases(part, quick, device)]
        # The copy last, so that all other cases have the same place in all tests, and each peer is made only once.
        copies = [case for case in cases if case[2] == peers.COPY]
        cases = [case for case in cases if case[2] != peers.COPY]
        cases += copies if metafunc.function.__name__ == "test_forward" else []
        ids = [f"{chosen.name}-{variant}-{name}" for _, (chosen, variant), name in cases]
        names = ("part", "problem", "peer_name")
        metafunc.parametrize(names, cases, ids=ids, indirect=["problem"], scope="module")
        metafunc.parametrize("caches", ("hot", "cold") if device == "cuda" else ("hot",))
    if "discriminator" in metafunc.fixturenames:
        metafunc.parametrize("discriminator", DISCRIMINATORS)
        metafunc.parametrize("normalization", training_step.CASES, ids="-".join)


@cache  # fixtures are used again where their parameter is the same object
def _cases(part: str, quick: bool, device: str) -> list[tuple[str, tuple[layer_sets.LayerSet, str], str]]:
    """Return what is timed as (part, (set, variant), peer)."""
    sets = report.sets(part)
    if quick:
        sets = [layer_sets.tiny() if part == "layers" else sets[0]]
    names = {chosen: measure.peers_for(part, chosen, device) for chosen in sets}
    problems = [(chosen, variant) for chosen in sets for variant in VARIANTS]
    return [
        (part, problem, name)
        for problem in problems
        for name in names[problem[0]]
        if not (quick and name in peers.COMPILED)
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if not results.records:
        return
    terminalreporter.section("aimed at and measured, one peer after another")
    for line in report.aims(results):
        terminalreporter.write_line(line)
    folder = config.getoption("report_to")
    if folder is not None:
        results.save(folder)
        report.render([results], folder)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("device")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("quick")


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    """Where records of what was timed go."""
    return request.config.stash[RESULTS]


@pytest.fixture(scope="session")
def timer(request: pytest.FixtureRequest) -> EventTimer:
    """The timer of all cases on a GPU."""
    return request.config.stash[TIMER]


@pytest.fixture(scope="module")
def problem(request: pytest.FixtureRequest, device: str) -> Problem:
    """The weights, vectors and gradients of a set."""
    return Problem(*request.param, device)


@pytest.fixture(scope="module")
def copy_seconds(problem: Problem) -> Callable[[str], float]:
    """What copying the set's weights takes, with hot or cold caches."""

    @cache
    def seconds(caches: str) -> float:
        copy, clock = peers.make(peers.COPY, problem), clock_for(problem.device, cold=caches == "cold")
        return median(clock.lap([copy.forward]).device[0] for _ in range(30))

    return seconds


@pytest.fixture(scope="module")
def peer(peer_name: str, problem: Problem) -> peers.Peer:
    """A peer whose first results have been found right."""
    return measure.prepare(peer_name, problem)
