"""The host's side of the CUDA kernels with two GPUs that are not there: the right device, and whose errors count."""

import ast
import ctypes
import functools
import re
import subprocess
import tempfile
from pathlib import Path

import cuda_emulated
import pytest

from bssn_fast.backends import cuda
from bssn_fast.layout import Batch

if cuda_emulated.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

HERE = Path(__file__).parent
SOURCES = ("forward.cpp", "backward.cpp", "device.cpp")
STREAM = 4711
CLUSTERS, KEEP = 2, 3
MANY = 300
"""More layers than arguments hold: they lie in a table that launches of their own write."""


@functools.cache
def host() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "host.so"
        sources = [HERE / "cuda_host.cpp", *(cuda_emulated.CSRC / "cuda" / name for name in SOURCES)]
        flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        includes = [f"-I{cuda_emulated.CSRC}", f"-I{HERE / 'cuda_runtime_stub'}"]
        subprocess.run([cuda_emulated.compiler(), *flags, *includes, *sources, "-o", target], check=True)
        loaded = ctypes.CDLL(str(target))
    for name in ("forward", "backward"):
        getattr(loaded, name).argtypes = (
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_int64,
        )
    loaded.forward_workspace.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    loaded.forward_workspace.restype = ctypes.c_int64
    return loaded


@functools.cache
def table(n: int, c_out: int = 4, c_in: int = 3):
    shapes = ((c_out, c_in, 3, 3),) * n
    strides = ((9 * c_in, 9, 3, 1),) * n
    return cuda._Table(Batch(shapes, strides, (0,) * n, (True,) * n), range(n))


def call(name: str, n: int, device: int, way: int = 0) -> tuple[int, list[tuple[int, int]]]:
    """Return the error and, for each launch and fill, the device that was current and the stream."""
    error = getattr(host(), name)(table(n).address, n, device, STREAM, way)
    notes = (ctypes.c_int64 * 200)()
    count = host().notes_into(notes, 100)
    return error, [(notes[2 * j], notes[2 * j + 1]) for j in range(count)]


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("n", [1, 100, MANY])
@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("current", [0, 1])
def test_everything_happens_on_the_weights_device(name, n, device, current):
    host().reset(current, 0, -1)
    error, notes = call(name, n, device)
    assert error == 0
    assert len(notes) == (5 if n == MANY else 2)
    assert set(notes) == {(device, STREAM)}
    assert host().current_device() == current


@pytest.mark.parametrize(("n", "launches", "blocks"), [(1, 1, 8), (10, 1, 80), (100, 1, 128), (MANY, 4, 128)])
def test_clusters_are_launched_whole_and_need_no_counters(n, launches, blocks):
    """Eight blocks each, as many as fit on 132 multiprocessors; nothing is cleared before."""
    host().reset(0, 0, -1)
    error, notes = call("forward", n, 0, way=CLUSTERS)
    assert error == 0
    assert (len(notes), host().launched_cluster(), host().launched_blocks()) == (launches, 8, blocks)
    call("forward", n, 0)
    assert host().launched_cluster() == 1


def test_three_blocks_that_keep_gradients_share_a_multiprocessor():
    host().reset(0, 0, -1)
    assert host().backward(table(1, 1024, 1024).address, 1, 0, STREAM, KEEP) == 0
    assert 2 * 132 < host().launched_blocks() <= 3 * 132
    available, reserved = 228 * 1024, 1024
    assert available // 4 < host().launched_shared() + reserved <= available // 3
    call("backward", 1, 0)
    assert host().launched_shared() < 1024


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("failing", range(3))
def test_failed_launches_leave_the_device_as_it_was(name, failing):
    host().reset(0, 0, failing)
    error, notes = call(name, MANY, 1)
    assert error == 700
    assert len(notes) == failing + 1
    assert host().current_device() == 0


def test_questions_leave_the_device_as_it_was():
    host().reset(0, 0, -1)
    assert host().status(1) == 0
    assert host().forward_workspace(table(1).address, 1, 1) > 0
    assert host().current_device() == 0


def test_a_device_that_is_not_there():
    host().reset(0, 0, -1)
    assert call("forward", 1, 5) == (101, [])
    assert host().forward_workspace(table(1).address, 1, 5) == -101


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_errors_of_earlier_calls_are_not_taken_for_this_one(name):
    """As after a question about another GPU that failed."""
    host().reset(0, 98, -1)
    assert call(name, MANY, 0)[0] == 0


def test_every_family_of_gpus_since_turing_is_compiled_for():
    """Code runs on later GPUs of the same major version only."""
    text = (cuda_emulated.CSRC.parent / "setup.py").read_text()
    (names,) = re.findall(r"^CUDA_ARCHS = (.*)$", text, flags=re.MULTILINE)
    assert {int(name) // 10 for name in ast.literal_eval(names)} == {7, 8, 9, 10, 11, 12}
