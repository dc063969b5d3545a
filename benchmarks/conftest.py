"""`pytest benchmarks/ --benchmark-only`: each peer by itself, with pytest-benchmark's statistics.

`python -m benchmarks.report` times the same peers in turns, which is fairer on a busy machine, and makes the report.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gan, layer_sets, machine, peers
from benchmarks.clock import clock_for, event_timer, peak_memory
from benchmarks.networks import DISCRIMINATORS
from benchmarks.problem import VARIANTS, Problem


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bssn_fast")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--quick", action="store_true", help="only small layers and networks, and nothing compiled")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("device") == "cuda":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=event_timer))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick, device = metafunc.config.getoption("quick"), metafunc.config.getoption("device")
    if "problem" in metafunc.fixturenames:
        sets = [layer_sets.tiny()] if quick else [*layer_sets.load().values(), layer_sets.square("linear", 20, 4)]
        pairs = [(chosen, variant) for chosen in sets for variant in VARIANTS]
        ids = [f"{chosen.name}-{variant}" for chosen, variant in pairs]
        metafunc.parametrize("problem", pairs, ids=ids, indirect=True, scope="module")
        names = [n for n in peers.names(device) if not (quick and n in peers.COMPILED)]
        if metafunc.function.__name__ != "test_forward":
            names.remove(peers.COPY)
        metafunc.parametrize("peer", names, indirect=True, scope="module")
    if "discriminator" in metafunc.fixturenames:
        metafunc.parametrize("discriminator", DISCRIMINATORS)
        metafunc.parametrize("normalization", gan.CASES, ids="-".join)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("device")


@pytest.fixture(scope="session", autouse=True)
def quick(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether only a small part runs: then on one thread, which waits for no other process."""
    threads, small = torch.get_num_threads(), request.config.getoption("quick")
    torch.set_num_threads(1 if small else threads)
    yield small
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def problem(request: pytest.FixtureRequest, device: str) -> Problem:
    """The weights, vectors and gradients of a set."""
    return Problem(*request.param, device)


@pytest.fixture(scope="module")
def copy_seconds(problem: Problem) -> float:
    """What copying the set's weights takes."""
    copy, clock = peers.make(peers.COPY, problem), clock_for(problem.device)
    return median(clock.lap([copy.forward]).device[0] for _ in range(30))


@pytest.fixture(scope="module")
def peer(request: pytest.FixtureRequest, problem: Problem) -> peers.Peer:
    """A peer whose results have been found right; `about` says what is known of it before timing."""
    made = peers.make(request.param, problem)
    peak = peak_memory(made.first_run, problem.device)
    made.check(request.param)
    made.about = {
        **machine.describe(problem.device),
        "set": problem.set.name,
        "variant": problem.variant,
        "peer": request.param,
        "weights_mb": problem.bytes / 1e6,
        "peak_memory_mb": None if peak is None or request.param in peers.COMPILED else peak / 1e6,
    }
    return made
