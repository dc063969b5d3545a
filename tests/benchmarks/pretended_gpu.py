"""A GPU that is only claimed: the CPU computes, and stand-ins for torch.cuda time, capture and count."""

from __future__ import annotations

import contextlib
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.work import devices

ABOUT = {
    "device": "NVIDIA H200",
    "torch": "2.11.0",
    "python": "3.12.3",
    "bssn_fast": "0.1.0",
    "cuda": "13.0",
    "threads": 16,
    "cache": 60 << 20,
    "peak_gb_s": 4800,
}


class Event:
    """Marks a moment of the host's, where a GPU's event marks one of its stream's."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


WAITS = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "unique", "masked_select"}
"""Operations whose answer the host waits for: while a graph is captured they are errors."""


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        assert name not in WAITS, f"{name} cannot be captured"
        result = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, result))
        return result


class Graph:
    """What a captured graph does: the same operations again, on the same tensors, with results in the same places."""

    def __init__(self) -> None:
        self._calls: list = []

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():  # where they were recorded
            for function, args, kwargs, was in self._calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(was), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _steps_of_adam(x: torch.Tensor) -> float:
    """What Adam asks of its count of steps on a CPU; on a GPU, made for capturing, it does not."""
    with _disable_current_modes():
        return x.item()


@contextlib.contextmanager
def graph(captured: Graph, pool: object = None):
    with _Recorder(captured._calls):
        yield


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU pass for a GPU in all of the benchmarks."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": lambda: stream,
        "stream": lambda chosen: contextlib.nullcontext(),
        "current_stream": lambda: stream,
        "synchronize": lambda device=None: None,
        "_sleep": lambda cycles: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1024, name=ABOUT["device"]),
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 1_000_000,
        "max_memory_allocated": lambda device: 3_000_000,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    # The profiler counts the CPU's operations in place of kernels.
    monkeypatch.setattr(torch.profiler, "ProfilerActivity", SimpleNamespace(CUDA=torch.profiler.ProfilerActivity.CPU))
    monkeypatch.setattr(torch.autograd, "DeviceType", SimpleNamespace(CUDA=torch.autograd.DeviceType.CPU))
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_value", _steps_of_adam)
    monkeypatch.setattr(devices, "pretended", True)
