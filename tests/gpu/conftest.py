"""Tests that need a GPU: `make gpu`. Without one there is nothing to collect here."""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "backends"), str(TESTS / "gpu")]

from ways import WAYS  # noqa: E402 - after the path is set

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(params=WAYS, ids="-".join)
def way(request, monkeypatch):
    """Each backend that serves GPUs here in each of its ways: (name, mode), with the mode switched on."""
    name, mode = request.param
    monkeypatch.setenv(f"BSSN_FAST_{name.upper()}_LAUNCH", mode)
    return name, mode


@pytest.fixture
def backend(way):
    """The name of the backend of `way`."""
    return way[0]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def no_synchronization():
    """A context in which whatever waits for the device raises."""

    @contextmanager
    def context():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context
