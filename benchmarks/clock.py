"""Time and memory: what a call takes, on a CPU or on a GPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

Stage = Callable[[], None]


@dataclass(frozen=True)
class Lap:
    """Seconds of consecutive stages. On a GPU: `device` by its own clock, `host` until the last launch returned."""

    device: list[float]
    host: list[float]


class CpuClock:
    """The wall clock."""

    cold_bytes = 1 << 28  # written between runs to leave nothing of the weights in the caches

    def __init__(self, device: torch.device, *, cold: bool = False) -> None:
        self._flush = torch.zeros(self.cold_bytes // 4, device=device) if cold else None

    def lap(self, stages: Sequence[Stage]) -> Lap:
        """Run the stages once, one after another."""
        if self._flush is not None:
            self._flush.add_(1)
        marks = [time.perf_counter()]
        for stage in stages:
            stage()
            marks.append(time.perf_counter())
        seconds = [b - a for a, b in pairwise(marks)]
        return Lap(seconds, seconds)


class CudaClock:
    """Events on the stream. Launches queue up behind a pause, so that the device never waits for the host."""

    PAUSE_CYCLES = 20_000_000  # about 10 ms, more than the host takes for any of the stages

    def __init__(self, device: torch.device, *, cold: bool = False) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(4 * cache, dtype=torch.int8, device=device) if cold else None

    def lap(self, stages: Sequence[Stage]) -> Lap:
        """Run the stages once, one after another."""
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
        if self._flush is not None:
            self._flush.zero_()
        torch.cuda._sleep(self.PAUSE_CYCLES)
        marks = [time.perf_counter()]
        events[0].record()
        for stage, event in zip(stages, events[1:], strict=True):
            stage()
            event.record()
            marks.append(time.perf_counter())
        torch.cuda.synchronize()
        device = [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
        return Lap(device, [b - a for a, b in pairwise(marks)])


def clock_for(device: torch.device | str, *, cold: bool = False) -> CpuClock | CudaClock:
    """Return the clock of a device; cold: with caches that hold nothing of the last run."""
    device = torch.device(device)
    return (CudaClock if device.type == "cuda" else CpuClock)(device, cold=cold)


def event_timer() -> float:
    """Return seconds by the GPU's clock at which all work launched so far is done: a timer for pytest-benchmark."""
    if not hasattr(event_timer, "start"):
        event_timer.start = torch.cuda.Event(enable_timing=True)
        event_timer.start.record()
    now = torch.cuda.Event(enable_timing=True)
    now.record()
    now.synchronize()
    return event_timer.start.elapsed_time(now) / 1e3


def peak_memory(run: Callable[[], None], device: torch.device | str) -> int | None:
    """Run once and return by how many bytes memory in use was higher at its highest than before; None if unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or what others have freed is used again and not seen
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before = _status("VmRSS")
    except (AttributeError, OSError, KeyError):  # not Linux, or not its usual C library
        run()
        return None
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return int(values[field].split()[0]) * 1024


def launches(run: Callable[[], None]) -> int:
    """Run once and return how many kernels, copies and fills it sent to the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
