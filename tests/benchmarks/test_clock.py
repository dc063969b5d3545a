"""Clocks of a GPU, with a make-believe one: its time passes by what is queued, the host's by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.timing import machine
from benchmarks.timing.clock import CudaClock, EventTimer


class Gpu:
    """Counts its own time in seconds."""

    def __init__(self) -> None:
        self.now, self.pauses, self.flushes = 100.0, [], 0

    def event(self, *, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event

    def sleep(self, cycles: int) -> None:
        self.pauses.append(cycles / CudaClock.CYCLES_PER_SECOND)
        self.now += self.pauses[-1]

    def work(self) -> None:
        self.now += 0.25


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    properties = SimpleNamespace(L2_cache_size=1024, name="NVIDIA A100 80GB PCIe")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return made


def test_laps_are_the_devices_time(gpu):
    clock = CudaClock(torch.device("cpu"))
    lap = clock.lap([gpu.work, gpu.work])
    assert lap.device == pytest.approx([0.25, 0.25])
    assert all(0 < seconds < 0.25 for seconds in lap.host)
    clock.host_took(0.01)
    clock.prepare()
    clock.host_took(1.0)  # the host waits for the end of the pause where the queue is full: it must not grow with that
    clock.prepare()
    assert gpu.pauses == pytest.approx([0.001, 0.015, 0.1])


def test_what_a_lap_starts_from_does_not_count(gpu):
    runs = []
    lap = CudaClock(torch.device("cpu")).lap([lambda: runs.append("run")], before=lambda: runs.append("before"))
    assert runs == ["before", "run"] * 2  # for the host's time and for the device's
    assert lap.device == [0]


def test_cold_laps_overwrite_the_cache(gpu):
    clock = CudaClock(torch.device("cpu"), cold=True)
    clock._flush.fill_(1)
    clock.lap([gpu.work])
    assert clock._flush.sum() == 0
    assert clock._flush.numel() == 4096


def test_the_fixtures_timer_leaves_the_pause_out(gpu):
    timer, clock = EventTimer(), CudaClock(torch.device("cpu"))
    for _ in range(2):
        timer.prepare(clock)
        start = timer()
        gpu.work()
        assert timer() - start == pytest.approx(0.25)
    first = timer()  # as when pytest-benchmark looks how precise it is
    gpu.work()
    assert timer() - first == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("name", "gb_s"), [("NVIDIA A100 80GB PCIe", 1935), ("NVIDIA L4", 300), ("NVIDIA L40", None), ("Tesla T4", 320)]
)
def test_bandwidth_of_the_data_sheets(gpu, monkeypatch, name, gb_s):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name=name))
    assert machine.vendor_bandwidth(torch.device("cuda")) == gb_s


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "cpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Intel(R) Xeon(R) Processor\n",
            "Intel Xeon (family 6, model 207)",
        ),
        ("model\t\t: 1\nmodel name\t: AMD EPYC 7763 64-Core Processor\n", "AMD EPYC 7763"),
        ("model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz\n", "Intel Xeon Platinum 8481C"),
    ],
)  # fmt: skip
def test_names_of_processors(monkeypatch, text, name):
    monkeypatch.setattr(machine.Path, "read_text", lambda path: text)
    assert machine.processor() == name
