"""The report of one machine: all tables."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean

from benchmarks.against.peers import COPY, OURS, TORCH
from benchmarks.shown import gpu_tables
from benchmarks.shown.markdown import ms, table
from benchmarks.shown.results import Results
from benchmarks.shown.targets import targets
from benchmarks.timing import machine
from benchmarks.timing.record import BOTH, Record
from benchmarks.work.layer_sets import GRID, square
from benchmarks.work.problem import VARIANTS
from benchmarks.work.training_step import NONE

PHASES = ("forward", "backward", BOTH)


def render(results: Results, plots: Iterable[Path] = ()) -> str:
    """Return the report as Markdown, with plots that lie in its folder."""
    on_gpu = results.kind == "cuda"
    layers = gpu_tables.layers if on_gpu else cpu_layers
    parts = [f"# {machine.title(results.machine)}", about(results), goals(results)]
    parts += [f"![{path.stem}]({path.name})" for path in plots]
    parts += [gpu_tables.kernels(results, v, p) for v in VARIANTS for p in gpu_tables.FLOORS] if on_gpu else []
    parts += [bounds([results]), *(layers(results, v, p) for v in VARIANTS for p in PHASES)]
    parts += [gpu_tables.host([results])]
    parts += [memory(results), preparation(results)]
    parts += [grid(results, kind, phase) for kind in GRID for phase in ("forward", BOTH)]
    parts += [gan_steps(results), failures(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def about(results: Results) -> str:
    """Return the machine and the versions."""
    info = results.machine
    cache = f"last-level cache {int(info['cache']) >> 20} MiB; " if info.get("cache") else ""
    peak = f"{info['peak_gb_s']:.0f} GB/s by the data sheet; " if info.get("peak_gb_s") else ""
    return f"{machine.title(info)}; {cache}{peak}{machine.versions(info)}."


def goals(results: Results) -> str:
    """Return what is aimed at, and whether it is reached."""
    rows = [[t.what, t.aim, t.found, "yes" if t.holds else "**no**"] for t in targets(results)]
    return "## Aimed at and measured\n\n" + table(["", "aimed at", "measured", "reached"], rows) if rows else ""


def bounds(machines: list[Results]) -> str:
    """Return mean and least of each comparison over all models, for each machine and backend of ours."""
    columns = [(results, ours) for results in machines for ours in results.ours()]
    peers = dict.fromkeys(p for r in machines for p in r.peers("layers") if p != COPY and OURS not in p)
    rows = []
    for variant in VARIANTS:
        for phase in PHASES:
            for peer in peers:
                cells = [_bound(results, ours, variant, phase, peer) for results, ours in columns]
                if any(cells):
                    rows.append([f"`{variant}` {phase}", peer, *cells])
    if not rows:
        return ""
    headings = [f"{machine.title(results.machine)}: {ours}" for results, ours in columns]
    title = "## How many times as fast: geometric mean over all models, and the least"
    return f"{title}\n\n" + table(["", "as", *headings], rows)


def _bound(results: Results, ours: str, variant: str, phase: str, peer: str) -> str:
    names = results.sets("layers", variant)
    found = {s: results.speedup("layers", s, variant, phase, ours, peer) for s in names}
    known = {s: x for s, x in found.items() if x}
    if not known:
        return ""
    worst = min(known, key=known.__getitem__)
    return f"{geometric_mean(known.values()):.1f} ({known[worst]:.1f}, {worst})"


def cpu_layers(results: Results, variant: str, phase: str) -> str:
    """Return one row per model: ours in milliseconds and in copies, the others in milliseconds and times ours."""
    ours, names = results.ours(), results.peers("layers")
    others = [n for n in names if n not in ours and n != COPY]
    rows = []
    for name in results.sets("layers", variant):
        copy = results.find("layers", name, variant, COPY, "forward")
        mine = [results.find("layers", name, variant, n, phase) for n in ours]
        best = min((r.median for r in mine if r), default=None)
        if copy is None or best is None:
            continue
        row = [name, str(copy.layers), f"{copy.megabytes:.1f}", f"{ms(copy.median)} ({copy.gb_s:.0f} GB/s)"]
        row += [f"{ms(r.median)} [{ms(r.q10)}, {ms(r.q90)}] ({r.copies:.1f} copies)" if r else "" for r in mine]
        row += [_against(results.find("layers", name, variant, n, phase), best) for n in others]
        rows.append(row)
    if not rows:
        return ""
    title = f"## `{variant}`, {phase}: milliseconds, with deciles of ours (and times ours)"
    return f"{title}\n\n" + table(["set", "layers", "MB", "copy", *ours, *others], rows)


def memory(results: Results) -> str:
    names = [n for n in results.peers("layers") if n != COPY]
    rows = []
    for variant in VARIANTS:
        for name in results.sets("layers", variant):
            found = [results.find("layers", name, variant, n, BOTH) for n in names]
            size = next((r.megabytes for r in found if r), 0)
            if size > 10:  # memory comes in pages and arenas: what is smaller drowns in them
                cells = [f"{r.peak_megabytes:.0f}" if r and r.peak_megabytes is not None else "" for r in found]
                rows.append([name, variant, f"{size:.0f}", *cells])
    if not rows:
        return ""
    title = "## Peak memory of one forward and backward, in MB beyond weights and incoming gradients"
    return f"{title}\n\n" + table(["set", "variant", "weights", *names], rows)


def preparation(results: Results) -> str:
    """Return what the first results cost, once, of peers that need seconds for them."""
    every = [n for n in results.peers("layers") if n != COPY]
    timed = [r for r in results.records if r.part == "layers" and (r.prepare_seconds or 0) > 2]
    names = [n for n in every if any(r.peer == n for r in timed)]
    rows = []
    for variant in VARIANTS if names else ():
        for name in results.sets("layers", variant):
            found = [results.find("layers", name, variant, n, BOTH) for n in names]
            rows.append(
                [name, variant, *(f"{r.prepare_seconds:.0f}" if r and r.prepare_seconds else "" for r in found)]
            )
    title = "## Seconds until the first result, once for each model: compiling. They count in no other table"
    return f"{title}\n\n" + table(["set", "variant", *names], rows) if rows else ""


def grid(results: Results, kind: str, phase: str) -> str:
    """Return one table of a synthetic grid: rows are numbers of layers, columns widths."""
    numbers, widths = GRID[kind]
    parts = []
    for variant in VARIANTS:
        for ours in results.ours(kind):
            rows = []
            for n in numbers:
                cells = []
                for w in widths:
                    record = results.find(kind, square(kind, n, w).name, variant, ours, phase)
                    peer = results.find(kind, square(kind, n, w).name, variant, TORCH, phase)
                    cells.append(f"{ms(record.median)} ({peer.median / record.median:.1f})" if record and peer else "")
                rows.append([str(n), *cells])
            if any(any(row[1:]) for row in rows):
                shape = "3 × 3 convolutions" if kind == "conv" else "linear layers"
                title = f"## {ours}, `{variant}` {phase} of n equal {shape}: milliseconds (times as fast as torch)"
                parts.append(f"{title}\n\n" + table(["n", *(f"width {w}" for w in widths)], rows))
    return "\n\n".join(parts)


def gan_steps(results: Results) -> str:
    """Return what normalisation adds to whole training steps."""
    rows = []
    for r in results.records:
        if r.part == "gan" and r.median:
            row = [r.set, r.variant, r.peer if r.peer != NONE else "", ms(r.median), added(r)]
            if results.kind == "cuda":
                row += [ms(r.host) if r.host else "", f"{r.peak_megabytes:.0f}" if r.peak_megabytes else ""]
            rows.append(row)
    title = f"## Whole training steps (added: {added_is(results.records)})"
    headings = ["discriminator", "normalisation", "by", "ms", "added"]
    headings += ["host, ms", "peak memory, MB"] if results.kind == "cuda" else []
    return f"{title}\n\n" + table(headings, rows) if rows else ""


def added_is(records: Iterable[Record]) -> str:
    """Say what `added` shows of these records: earlier results have no intervals."""
    known = any(r.added_low is not None and r.added_high is not None for r in records)
    return "median and its 95 % interval" if known else "median"


def added(record: Record | None) -> str:
    """Return what normalisation adds to a step, with its interval where it is known."""
    if record is None or record.added is None or record.variant == NONE:
        return ""
    known = record.added_low is not None and record.added_high is not None
    return f"{record.added:+.1f} %" + (f" [{record.added_low:+.1f}, {record.added_high:+.1f}]" if known else "")


def failures(results: Results) -> str:
    """Return what was not timed because its results were wrong or it failed."""
    rows = [[r.part, r.set, r.variant, r.peer, r.error.replace("|", "/")] for r in results.records if r.error]
    return "## Not timed\n\n" + table(["part", "set", "variant", "peer", "why"], rows) if rows else ""


def _against(record: Record | None, ours: float) -> str:
    return f"{ms(record.median)} ({record.median / ours:.1f})" if record else "–"
