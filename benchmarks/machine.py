"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

import bssn_fast


def processor() -> str:
    """Return the processor's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def last_level_cache() -> int | None:
    """Return the size in bytes of the largest cache of the first core, if the system tells."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes, default=None)


def pin_threads(threads: int) -> None:
    """Use this many threads, on as many of the cores that this process may run on."""
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def describe(device: torch.device | str = "cpu") -> dict[str, object]:
    """Return device, threads and versions, for the report."""
    device = torch.device(device)
    about: dict[str, object] = {
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "bssn_fast": bssn_fast.__version__,
        "system": platform.system(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "device": properties.name,
            "cuda": torch.version.cuda,
            "cache": properties.L2_cache_size,
            "peak_gb_s": vendor_bandwidth(device),
        }
    else:
        about |= {
            "device": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cache": last_level_cache(),
        }
    return about


def vendor_bandwidth(device: torch.device) -> float | None:
    """Return the memory bandwidth in GB/s that follows from the GPU's clock and bus width, if torch tells them."""
    properties = torch.cuda.get_device_properties(device)
    clock, width = getattr(properties, "memory_clock_rate", None), getattr(properties, "memory_bus_width", None)
    return 2 * clock * 1e3 * width / 8 / 1e9 if clock and width else None  # two transfers per clock, kHz, bits


def key(about: dict[str, object]) -> str:
    """Return the folder for a machine's results: device, threads and torch's version."""
    threads = "" if "cuda" in about else f"-{about['threads']}-threads"
    device = re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower()).strip("-")
    return f"{device}{threads}/torch-{about['torch']}"
