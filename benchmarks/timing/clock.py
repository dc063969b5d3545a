"""Time and memory: what a call takes, on a CPU or on a GPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.work.devices import is_gpu

Stage = Callable[[], None]


def _nothing() -> None:
    pass


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

    def lap(self, stages: Sequence[Stage], before: Stage = _nothing) -> Lap:
        """Run `before`, which does not count, and then the stages once, one after another."""
        before()
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

    CYCLES_PER_SECOND = 2_500_000_000  # at most, of the clock that pauses are counted by
    SHORTEST, LONGEST = 0.001, 0.1  # pauses, in seconds: a queue that is full makes the host wait for their end

    def __init__(self, device: torch.device, *, cold: bool = False) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(4 * cache, dtype=torch.int8, device=device) if cold else None
        self._pause = 0.01

    def prepare(self) -> None:
        """Finish all work, empty the cache if that is asked for, and let the device pause before what comes next."""
        torch.cuda.synchronize()
        if self._flush is not None:
            self._flush.zero_()
        torch.cuda._sleep(int(self._pause * self.CYCLES_PER_SECOND))

    def host_took(self, seconds: float) -> None:
        """Let the next pause be longer than this."""
        self._pause = min(max(self.SHORTEST, 1.5 * seconds), self.LONGEST)

    def lap(self, stages: Sequence[Stage], before: Stage = _nothing) -> Lap:
        """Run the stages twice, `before` each time: for the host's time, without a pause, and for the device's."""
        before()
        torch.cuda.synchronize()
        host = []
        for stage in stages:
            start = time.perf_counter()
            stage()
            host.append(time.perf_counter() - start)
        before()
        self.host_took(sum(host))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
        self.prepare()
        events[0].record()
        for stage, event in zip(stages, events[1:], strict=True):
            stage()
            event.record()
        torch.cuda.synchronize()
        return Lap([a.elapsed_time(b) / 1e3 for a, b in pairwise(events)], host)


def clock_for(device: torch.device | str, *, cold: bool = False) -> CpuClock | CudaClock:
    """Return the clock of a device; cold: with caches that hold nothing of the last run."""
    device = torch.device(device)
    return (CudaClock if is_gpu(device) else CpuClock)(device, cold=cold)


class EventTimer:
    """A timer for pytest-benchmark, made of events: seconds by the GPU's clock.

    A run that follows `prepare` is timed as `CudaClock` does it: its launches queue up behind a pause. pytest-benchmark
    asks a timer twice for each run, before it and after it; the first answer is then 0. Asked at other times it says
    when all work launched so far was done.
    """

    def __init__(self) -> None:
        self._origin: torch.cuda.Event | None = None
        self._start: torch.cuda.Event | None = None
        self._prepared = False

    def prepare(self, clock: CudaClock) -> None:
        """Begin a run: the next two times asked for are its beginning and its end."""
        clock.prepare()
        self._prepared, self._start = True, None

    def __call__(self) -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        if self._prepared:
            self._prepared, self._start = False, now
            return 0.0
        now.synchronize()
        if self._start is not None:
            start, self._start = self._start, None
            return start.elapsed_time(now) / 1e3
        if self._origin is None:
            self._origin = now
        return self._origin.elapsed_time(now) / 1e3


def peak_memory(run: Callable[[], None], device: torch.device | str) -> int | None:
    """Run once and return by how many bytes memory in use was higher at its highest than before; None if unknown."""
    device = torch.device(device)
    if is_gpu(device):
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
