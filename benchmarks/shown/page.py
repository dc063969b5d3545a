"""The parts of the pages in docs/ that show results: those of all machines, side by side."""

from __future__ import annotations

import os
import re
from pathlib import Path

from benchmarks.shown import gpu_tables, plots
from benchmarks.shown.markdown import replace, table
from benchmarks.shown.results import FOLDER, Results, everything
from benchmarks.shown.tables import about, added, added_is, bounds
from benchmarks.shown.targets import Target, targets
from benchmarks.timing import gpu_plan, machine
from benchmarks.work.problem import VARIANTS
from benchmarks.work.training_step import NONE

DOCS = Path(__file__).parents[2] / "docs"
PAGE, KERNELS = "performance.md", "performance-gpu.md"


def renew(kind: str, docs: Path = DOCS, folder: Path = FOLDER) -> None:
    """Write the results of a kind of device into the pages; raises ValueError if one lacks their place."""
    machines = [results for results in everything(folder) if results.kind == kind]
    page = docs / PAGE
    replace(page, f"results: {kind}", render(machines, page, folder))
    if kind == "cuda":
        kernels = docs / KERNELS
        replace(kernels, "results: kernels", render_kernels(machines, kernels, folder))
        replace(kernels, "awaiting measurement", awaiting(machines))


def render(machines: list[Results], page: Path, folder: Path = FOLDER) -> str:
    """Return the machines' results as Markdown."""
    if not machines:
        return "No results yet."
    parts = [goals(machines), bounds(machines), gpu_tables.host(machines), gan_steps(machines)]
    parts += [pictures(results, page, folder) for results in machines]
    return _below("\n\n".join(part for part in parts if part))


def render_kernels(machines: list[Results], page: Path, folder: Path = FOLDER) -> str:
    """Return the kernels' times on each GPU, beside their floor."""
    parts = []
    for results in machines:
        link = Path(os.path.relpath(folder / machine.key(results.machine), page.parent))
        parts.append(f"## {_name(results)}\n\n{about(results)} [All tables]({link / 'report.md'}).")
        parts += [gpu_tables.kernels(results, v, p).replace("## ", "### ") for v in VARIANTS for p in gpu_tables.FLOORS]
    return _below("\n\n".join(part for part in parts if part)) or "No results yet."


def _below(text: str) -> str:
    """Return the text with its headings one level lower: the page has its own."""
    return re.sub("^##", "###", text, flags=re.M)


def awaiting(machines: list[Results]) -> str:
    """Return a table of what has been measured on none of these GPUs."""
    missing = gpu_plan.awaiting(record for results in machines for record in results.records)
    rows = [[plan.what, f"`{plan.variant}`", plan.dtype, ", ".join(sets)] for plan, sets in missing]
    return table(["", "variant", "weights", "of"], rows) if rows else "Nothing."


def goals(machines: list[Results]) -> str:
    """Return what is aimed at and what each machine says of it."""
    known = [{t.what: t for t in targets(results)} for results in machines]
    rows = []
    for what, target in {what: t for found in reversed(known) for what, t in found.items()}.items():
        cells = [found.get(what) for found in known]
        rows.append([what, target.aim, *(_answer(t) for t in cells)])
    title = "## Aimed at and measured (bold: not reached)"
    return f"{title}\n\n" + table(["", "aimed at", *(_name(m) for m in machines)], rows) if rows else ""


def gan_steps(machines: list[Results]) -> str:
    """Return what normalisation adds to whole training steps on each machine."""
    cases = dict.fromkeys((r.set, r.variant, r.peer) for m in machines for r in m.records if r.part == "gan")
    rows = []
    for name, variant, peer in cases:
        if variant != NONE:
            cells = [added(m.find("gan", name, variant, peer, "step")) for m in machines]
            rows.append([name, variant, peer, *cells])
    steps = (r for m in machines for r in m.records if r.part == "gan")
    title = f"## What normalisation adds to a whole training step ({added_is(steps)})"
    headings = ["discriminator", "normalisation", "by", *(_name(m) for m in machines)]
    return f"{title}\n\n" + table(headings, rows) if rows else ""


def pictures(results: Results, page: Path, folder: Path) -> str:
    """Return one machine's plots, with a link to its full tables."""
    place = folder / machine.key(results.machine)
    link = Path(os.path.relpath(place, page.parent))
    found = [name for name in plots.NAMES if (place / f"{name}.png").exists()]
    images = "\n".join(f"![{plots.NAMES[name]}]({link / name}.png)" for name in found)
    return f"## {_name(results)}\n\n{about(results)} [All tables]({link / 'report.md'}).\n\n{images}"


def _answer(target: Target | None) -> str:
    if target is None:
        return ""
    return target.found if target.holds else f"**{target.found}**"


def _name(results: Results) -> str:
    return f"{machine.title(results.machine)}, torch {results.machine['torch']}"
