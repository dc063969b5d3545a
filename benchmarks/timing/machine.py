"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

import bssn_fast

VENDOR_GB_S = {
    "Tesla T4": 320,
    "Tesla V100": 900,
    "NVIDIA A10": 600,
    "NVIDIA A100-SXM4-40GB": 1555,
    "NVIDIA A100-PCIE-40GB": 1555,
    "NVIDIA A100-SXM4-80GB": 2039,
    "NVIDIA A100 80GB PCIe": 1935,
    "NVIDIA L4": 300,
    "NVIDIA L40S": 864,
    "NVIDIA RTX A6000": 768,
    "NVIDIA GeForce RTX 3090": 936,
    "NVIDIA GeForce RTX 4090": 1008,
    "NVIDIA GeForce RTX 5090": 1792,
    "NVIDIA H100 PCIe": 2000,
    "NVIDIA H100 80GB HBM3": 3350,
    "NVIDIA H100 NVL": 3900,
    "NVIDIA H200": 4800,
    "NVIDIA GH200 480GB": 4000,
    "NVIDIA B200": 8000,
    "AMD Instinct MI300X": 5300,
}
"""Memory bandwidth in GB/s that the data sheets give, by the beginning of the name that torch reports.

There is no such table for CPUs: it would depend on how many memory channels are filled, and how fast.
"""


def processor() -> str:
    """Return the processor's name; with family and model where the name has no number, as in virtual machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = re.sub(r"\((R|TM)\)|@.*|\bCPU\b|\bProcessor\b|\b\d+-Core\b", "", fields.get("model name", ""), flags=re.I)
    name = " ".join(name.split()) or platform.processor() or platform.machine()
    if not re.search(r"\d", name) and "model" in fields:
        name += f" (family {fields.get('cpu family')}, model {fields['model']})"
    return name


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
    """Return the GPU's memory bandwidth in GB/s: the data sheet's or, of others, what clock and bus width give."""
    properties = torch.cuda.get_device_properties(device)
    for name, gb_s in VENDOR_GB_S.items():
        if re.match(re.escape(name) + r"(?![A-Za-z0-9])", properties.name):  # an L40 is no L4
            return gb_s
    clock, width = getattr(properties, "memory_clock_rate", None), getattr(properties, "memory_bus_width", None)
    return 2 * clock * 1e3 * width / 8 / 1e9 if clock and width else None  # two transfers per clock, kHz, bits


def title(about: dict[str, object]) -> str:
    """Return the machine in a few words."""
    return str(about["device"]) if "cuda" in about else f"{about['device']}, {about['threads']} threads"


def versions(about: dict[str, object]) -> str:
    """Return the versions in a few words."""
    cuda = f", CUDA {about['cuda']}" if "cuda" in about else ""
    return f"torch {about['torch']}{cuda}, Python {about['python']}, bssn_fast {about['bssn_fast']}"


def key(about: dict[str, object]) -> str:
    """Return the folder for a machine's results: device, threads and torch's version."""
    device = re.sub(r"[^a-z0-9]+", "-", title(about).lower()).strip("-")
    return f"{device}/torch-{about['torch']}"
