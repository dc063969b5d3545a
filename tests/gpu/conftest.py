"""Tests that need a GPU: `make gpu`. Without one they are listed by `pytest --collect-only` and do not run."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "backends"), str(TESTS / "gpu")]

from benchmarks.against.peers import variable_of  # noqa: E402 - after the path is set
from benchmarks.gpu import compile_once  # noqa: E402

compile_once.install()  # before `ways`, which asks Triton for a kernel

from ways import WAYS  # noqa: E402

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    """Without a GPU there is nothing that these tests could run on."""
    mine = [item for item in items if HERE in item.path.parents]
    if mine and not torch.cuda.is_available() and not config.getoption("collectonly"):
        items[:] = [item for item in items if HERE not in item.path.parents]
        config.hook.pytest_deselected(items=mine)


_may_be_spoiled = False


def pytest_runtest_logreport(report):
    global _may_be_spoiled
    _may_be_spoiled |= report.failed


def pytest_runtest_logfinish(nodeid):
    """An error of a kernel is that of all later calls in the process: end it, for xdist to go on in another one."""
    if _may_be_spoiled and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(3)


@pytest.fixture(params=WAYS, ids="-".join)
def way(request, monkeypatch):
    """Each backend that serves GPUs here in each of its ways: (name, mode), with the mode switched on."""
    monkeypatch.setenv(*variable_of(*request.param))
    return request.param


@pytest.fixture
def backend(way):
    """The name of the backend of `way`."""
    return way[0]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the reference's tensors are small, and other workers want the cores too


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
