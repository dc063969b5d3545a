"""The part of docs/performance.md that shows results: those of all machines, side by side."""

from __future__ import annotations

import os
import re
from pathlib import Path

from benchmarks.shown import plots
from benchmarks.shown.results import FOLDER, Results, everything
from benchmarks.shown.tables import about, added, added_is, bounds, table
from benchmarks.shown.targets import Target, targets
from benchmarks.timing import machine
from benchmarks.work.training_step import NONE

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def renew(kind: str, page: Path = PAGE, folder: Path = FOLDER) -> None:
    """Replace what stands between the page's markers of a kind of device; raises ValueError if it has none."""
    begin, end = f"<!-- begin results: {kind} -->", f"<!-- end results: {kind} -->"
    pattern = re.compile(re.escape(begin) + ".*" + re.escape(end), re.S)
    shown = render([results for results in everything(folder) if results.kind == kind], page, folder)
    text, count = pattern.subn(lambda _: f"{begin}\n{shown}\n{end}", page.read_text())
    if count != 1:
        raise ValueError(f"{page} must have the lines {begin!r} and {end!r} once")
    page.write_text(text)


def render(machines: list[Results], page: Path = PAGE, folder: Path = FOLDER) -> str:
    """Return the machines' results as Markdown."""
    if not machines:
        return "No results yet."
    parts = [goals(machines), bounds(machines), gan_steps(machines)]
    parts += [pictures(results, page, folder) for results in machines]
    return re.sub("^## ", "### ", "\n\n".join(part for part in parts if part), flags=re.M)  # the page has its own


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
