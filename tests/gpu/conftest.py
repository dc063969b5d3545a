"""Tests that need a GPU: `make gpu`. Without one there is nothing to collect here."""

import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "backends")]

from bssn_fast import backends  # noqa: E402 - after the path is set

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]

WAYS = [  # a backend and, for Triton, its way of launching
    (backend, mode)
    for backend, modes in (("triton", ("single", "phases")), ("cuda", ("",)))
    for mode in modes
    if torch.cuda.is_available() and backends.why_unavailable(backend, "cuda") is None
]


@pytest.fixture(params=WAYS, ids=lambda way: "-".join(filter(None, way)))
def backend(request, monkeypatch):
    """The name of each backend that serves GPUs here, in each of its ways."""
    name, mode = request.param
    if mode:
        monkeypatch.setenv("BSSN_FAST_TRITON_LAUNCH", mode)
    return name


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def no_synchronization():
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
