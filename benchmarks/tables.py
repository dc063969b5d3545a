"""The tables of docs/performance.md."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.gan import NONE
from benchmarks.layer_sets import GRID, square
from benchmarks.measure import BOTH, Record
from benchmarks.peers import COPY, OURS, TORCH
from benchmarks.results import Results, geometric_mean
from benchmarks.targets import targets

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
VARIANTS = ("sn", "bssn")
PHASES = ("forward", "backward", BOTH)


def renew(results: Results, block: str, page: Path = PAGE) -> None:
    """Replace what stands between the page's markers of this block; raises ValueError if it has none."""
    begin, end = f"<!-- begin results: {block} -->", f"<!-- end results: {block} -->"
    pattern = re.compile(re.escape(begin) + ".*" + re.escape(end), re.S)
    text, count = pattern.subn(lambda _: f"{begin}\n{render(results)}\n{end}", page.read_text())
    if count != 1:
        raise ValueError(f"{page} must have the lines {begin!r} and {end!r} once")
    page.write_text(text)


def render(results: Results) -> str:
    """Return all tables as Markdown."""
    parts = [machine(results), goals(results), bounds(results)]
    parts += [layers(results, v, p) for v in VARIANTS for p in PHASES]
    parts += [memory(results), *(grid(results, kind) for kind in GRID), gan_steps(results)]
    return "\n\n".join(part for part in parts if part)


def machine(results: Results) -> str:
    about = results.machine
    cache = f", last-level cache {int(about['cache']) >> 20} MiB" if about.get("cache") else ""
    return (
        f"Measured on {about['device']}, {about['threads']} threads{cache}; torch {about['torch']}, "
        f"Python {about['python']}, bssn_fast {about['bssn_fast']}."
    )


def goals(results: Results) -> str:
    """Return what is demanded of the CPU path, and whether it holds."""
    rows = [[t.what, t.demanded, t.found, "yes" if t.holds else "**no**"] for t in targets(results)]
    return "### Demanded and measured\n\n" + _table(["", "demanded", "measured", "holds"], rows) if rows else ""


def bounds(results: Results) -> str:
    """Return the least favourable and the mean of each comparison."""
    rows = []
    for ours in results.ours():
        comparisons = [
            (v, phase, peer)
            for v in VARIANTS
            for phase in PHASES
            for peer in results.peers("layers")
            if peer not in (ours, COPY) and OURS not in peer
        ]
        for variant, phase, peer in comparisons:
            names = results.sets("layers", variant)
            found = {s: results.speedup("layers", s, variant, phase, ours, peer) for s in names}
            known = {s: x for s, x in found.items() if x}
            if known:
                worst = min(known, key=known.__getitem__)
                mean = f"{geometric_mean(known.values()):.1f}"
                rows.append([ours, variant, phase, peer, f"{known[worst]:.1f} ({worst})", mean])
    if not rows:
        return ""
    headings = ["", "variant", "", "times as fast as", "least", "geometric mean"]
    return "### How many times as fast, over all models\n\n" + _table(headings, rows)


def layers(results: Results, variant: str, phase: str) -> str:
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
        row = [name, str(copy.layers), f"{copy.megabytes:.1f}", _ms(copy.median)]
        row += [f"{_ms(r.median)} ({r.copies:.1f} copies)" if r else "" for r in mine]
        row += [_against(results.find("layers", name, variant, n, phase), best) for n in others]
        rows.append(row)
    if not rows:
        return ""
    headings = ["set", "layers", "MB", "copy", *ours, *others]
    return f"### `{variant}`, {phase}: milliseconds (and times ours)\n\n" + _table(headings, rows)


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
    title = "### Peak memory of one forward and backward, in MB beyond weights and incoming gradients"
    return f"{title}\n\n" + _table(["set", "variant", "weights", *names], rows)


def grid(results: Results, kind: str) -> str:
    """Return one table of a synthetic grid: rows are numbers of layers, columns widths."""
    numbers, widths = GRID[kind]
    parts = []
    for variant in VARIANTS:
        for ours in results.ours(kind):
            rows = []
            for n in numbers:
                cells = []
                for w in widths:
                    record = results.find(kind, square(kind, n, w).name, variant, ours, "forward")
                    peer = results.find(kind, square(kind, n, w).name, variant, TORCH, "forward")
                    cells.append(f"{_ms(record.median)} ({peer.median / record.median:.1f})" if record and peer else "")
                rows.append([str(n), *cells])
            if any(any(row[1:]) for row in rows):
                shape = "3 × 3 convolutions" if kind == "conv" else "linear layers"
                title = f"### {ours}, `{variant}` forward of n equal {shape}: milliseconds (times as fast as torch)"
                parts.append(f"{title}\n\n" + _table(["n", *(f"width {w}" for w in widths)], rows))
    return "\n\n".join(parts)


def gan_steps(results: Results) -> str:
    """Return what normalisation adds to whole training steps."""
    rows = []
    for name in results.sets("gan"):
        for r in results.records:
            if r.part == "gan" and r.set == name and r.median:
                added = "" if r.variant == NONE else f"{r.added:+.1f} %"
                rows.append([name, r.variant, r.peer if r.variant != NONE else "", _ms(r.median), added])
    if not rows:
        return ""
    return "### Whole training steps\n\n" + _table(["discriminator", "normalisation", "by", "ms", "added"], rows)


def _against(record: Record | None, ours: float) -> str:
    return f"{_ms(record.median)} ({record.median / ours:.1f})" if record else "–"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *rows)]
    return "\n".join(lines)
