"""Tables of a GPU's results: kernels beside their floor, all peers, and the host's time."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.against.peers import COPY, OURS, TORCH
from benchmarks.shown.markdown import ms, table
from benchmarks.shown.results import Results
from benchmarks.timing.gpu_plan import CACHES
from benchmarks.timing.record import BOTH, Record
from benchmarks.work.problem import VARIANTS

FLOORS = {"forward": 1.5, "backward": 2.0}
"""Least traffic, 2 reads and 1 write or 3 reads and 1 write, in plain copies, which are 1 read and 1 write."""


def dtypes(results: Results, part: str = "layers") -> list[str]:
    """Return the names of the weights' dtypes in a part."""
    return list(dict.fromkeys(r.dtype for r in results.records if r.part == part))


def kernels(results: Results, variant: str, phase: str) -> str:
    """Return ours, in each way of launching, in microseconds and in units of the floor: one row per set and dtype."""
    ours = [name for name in results.ours() if not name.endswith("graph")]
    rows = []
    for name in results.sets("layers", variant):
        for dtype in dtypes(results):
            for caches in CACHES:
                copy = results.find("layers", name, variant, COPY, "forward", caches, dtype)
                found = [results.find("layers", name, variant, n, phase, caches, dtype) for n in ours]
                if copy is not None and any(found):
                    row = [name, dtype, caches, f"{copy.megabytes:.1f}", _us(copy)]
                    rows.append(row + [_over_floor(r, phase) for r in found])
    if not rows:
        return ""
    title = f"## `{variant}`, {phase}: microseconds, and times the floor"
    headings = ["set", "weights", "caches", "MB", "copy", *(n.removeprefix(f"{OURS} ") for n in ours)]
    return f"{title}\n\n" + table(headings, rows)


def layers(results: Results, variant: str, phase: str) -> str:
    """Return one row per model, dtype and peer: hot and cold caches, host time, launches."""
    peak = results.machine.get("peak_gb_s")
    rows = []
    for name in results.sets("layers", variant):
        for dtype in dtypes(results):
            for peer in results.peers("layers"):
                hot, cold = (results.find("layers", name, variant, peer, phase, c, dtype) for c in CACHES)
                either = cold or hot
                if either is None:
                    continue
                row = [name, dtype, peer, *(_us(r) for r in (hot, cold))]
                row += [f"{1e3 * either.host:.0f}" if either.host else "", str(either.launches or "")]
                row += [f"{either.copies:.2f}" if either.copies else "", f"{either.gb_s:.0f}"]
                row += [f"{100 * either.gb_s / float(str(peak)):.0f} %" if peak and cold else ""]
                rows.append(row)
    if not rows:
        return ""
    headings = [
        *("set", "weights", "peer", "L2 hot", "L2 cold", "host", "launches", "copies", "GB/s"),
        "of the data sheet's",
    ]
    return f"## `{variant}`, {phase}: microseconds\n\n" + table(headings, rows)


def host(machines: Sequence[Results]) -> str:
    """Return what the host takes for many small layers, and how many times as long torch's parametrization takes."""
    rows = []
    for results in machines:
        for name in results.sets("host"):
            for peer in results.peers("host"):
                row = [str(results.machine["device"]), name, peer]
                for variant in VARIANTS:
                    for phase in ("forward", BOTH):
                        row.append(_host(results, name, variant, peer, phase))
                if peer != COPY and any(row[3:]):
                    rows.append(row)
    if not rows:
        return ""
    cases = [f"`{variant}` {phase}" for variant in VARIANTS for phase in ("forward", BOTH)]
    title = "## Host time in microseconds (torch's parametrization takes so many times as long)"
    return f"{title}\n\n" + table(["GPU", "layers", "by", *cases], rows)


def _host(results: Results, name: str, variant: str, peer: str, phase: str) -> str:
    record = results.find("host", name, variant, peer, phase)
    torch = results.find("host", name, variant, TORCH, phase)
    if record is None or not record.host:
        return ""
    return f"{1e3 * record.host:.0f}" + (f" ({torch.host / record.host:.1f})" if torch and torch.host else "")


def _us(record: Record | None) -> str:
    if record is None or record.median is None:
        return ""
    return ms(1e3 * record.median) if record.median < 0.1 else f"{1e3 * record.median:.0f}"


def _over_floor(record: Record | None, phase: str) -> str:
    if record is None:
        return ""
    return _us(record) + (f" ({record.copies / FLOORS[phase]:.2f})" if record.copies else "")
