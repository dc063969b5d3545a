"""The CUDA kernels on the CPU, with the functions that the extension module has for CUDA, and their plans."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = (HERE / "cuda_emulation.cpp", HERE / "cuda_plans.cpp")

I32, I64, REAL, ADDRESS, BOOL = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p, ctypes.c_bool
DEVICE = (I32, I64)
SIGNATURES = {
    "forward_workspace": (I64, (ADDRESS, I64, I64, I64, *DEVICE)),
    "backward_workspace": (I64, (ADDRESS, I64, I64, I64, *DEVICE)),
    "forward": (
        I32,
        (ADDRESS, I64, ADDRESS, ADDRESS, ADDRESS, I64, I64, ADDRESS, REAL, I64, ADDRESS, I64, *DEVICE),
    ),
    "backward": (I32, (ADDRESS, I64, ADDRESS, ADDRESS, I64, I64, ADDRESS, ADDRESS, ADDRESS, I64, *DEVICE)),
    "set_last_thread_first": (None, (BOOL,)),
    "set_order": (None, (ctypes.c_uint64,)),
    "count_launches": (I32, ()),
    "count_claims": (I32, (I32, I32)),
    "divide": (ctypes.c_uint32, (ctypes.c_uint32, I64)),
    "plan_of": (None, (ADDRESS, I32, I64, I64, *DEVICE, ADDRESS)),
    "order_of": (I32, (ADDRESS, I32, I64, I64, *DEVICE, ADDRESS)),
    "backward_plan_of": (I32, (ADDRESS, I32, I64, I64, *DEVICE, ADDRESS)),
}


ERRORS = {
    1: "waited for a tile with a larger ticket, or after work on the tile had begun",
    2: "bad dtype",
    3: "all tiles that are left wait",
    4: "wrote beyond the shared memory that was asked for",
    5: "told other blocks of results before a barrier: some threads may not have written theirs",
    6: "ended with copies into shared memory on their way",
    7: "read the shared memory of a block that has ended",
    8: "arrived at the cluster's barrier twice, or waited without having arrived",
    9: "looked at what one thread had written without a barrier in between",
}


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "emulation.so"
        flags = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"]
        flags += ["-shared", "-fPIC", "-pthread"]
        # An address that a GPU refuses ends the process here too.
        flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
        subprocess.run([compiler(), *flags, f"-I{CSRC}", *SOURCES, "-o", target], check=True)
        loaded = ctypes.CDLL(str(target))
    for name, (result, arguments) in SIGNATURES.items():
        getattr(loaded, name).restype, getattr(loaded, name).argtypes = result, arguments
    return loaded


@contextmanager
def last_thread_first() -> Iterator[None]:
    """Within, a block's threads run from the last to the first."""
    library().set_last_thread_first(True)
    try:
        yield
    finally:
        library().set_last_thread_first(False)


@contextmanager
def tickets_in_any_order(seed: int) -> Iterator[None]:
    """Within, tickets run in an order of this seed (not 0) that the waits allow."""
    library().set_order(seed)
    try:
        yield
    finally:
        library().set_order(0)


@dataclass(frozen=True)
class Gpu:
    """A GPU's limits; plays the extension module."""

    multiprocessors: int
    shared_bytes: int

    @property
    def limits(self) -> tuple[int, int]:
        return self.multiprocessors, self.shared_bytes

    def cuda_forward_workspace(self, geometry: int, n: int, dtype: int, way: int, device: int | None) -> int:
        return library().forward_workspace(geometry, n, dtype, way, *self.limits)

    def cuda_backward_workspace(self, geometry: int, n: int, dtype: int, way: int, device: int | None) -> int:
        return library().backward_workspace(geometry, n, dtype, way, *self.limits)

    def cuda_forward(self, *arguments) -> int:
        return library().forward(*arguments[:-2], *self.limits)

    def cuda_backward(self, *arguments) -> int:
        return library().backward(*arguments[:-2], *self.limits)

    def cuda_error_string(self, error: int) -> str:
        return ERRORS[error]


H200 = Gpu(132, 227 * 1024)
T4 = Gpu(40, 64 * 1024)
TINY = Gpu(2, 40 * 1024)  # less shared memory than any GPU has: few steps, and rows that do not fit
