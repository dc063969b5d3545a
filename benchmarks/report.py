"""Measure everything on this machine, write the results and renew docs/performance.md and the README's chart.

`python -m benchmarks.report` does it all. With --parts, --sets or --peers only a part is measured, and replaces that
part of earlier results of the same machine and versions. Only peers of the same run have taken turns: figures to be
published come from runs of all peers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.against import peers
from benchmarks.shown import compare, front, page, plots, results, tables
from benchmarks.shown.targets import targets
from benchmarks.timing import machine, measure
from benchmarks.timing.record import Record
from benchmarks.work import layer_sets, training_step
from benchmarks.work.devices import is_gpu
from benchmarks.work.problem import VARIANTS

SET_PARTS = ("layers", *layer_sets.GRID)
PARTS = (*SET_PARTS, "gan")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sets", nargs="+", help="only these layer sets or points of the grid")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    parser.add_argument("--peers", nargs="+", help="only these peers (the plain copy is always there)")
    parser.add_argument("--without", nargs="+", default=[], help="leave out these peers")
    parser.add_argument("--seconds", type=float, default=3, help="about, for each set and variant (%(default)s)")
    parser.add_argument("--batch", type=int, help="of the training steps; 64 on a GPU and 8 on a CPU by default")
    parser.add_argument("--check-only", action="store_true", help="compare results with the reference, time nothing")
    parser.add_argument("--render-only", action="store_true", help="renew all plots and tables from kept results")
    parser.add_argument("--compare", action="store_true", help="compare with the kept results, write nothing")
    parser.add_argument("--against", type=Path, help="folder of the results to compare with, such as another version's")
    parser.add_argument("--output", type=Path, help="folder of the results; by default among the kept ones")
    return parser.parse_args(words)


def measurements(args: argparse.Namespace) -> Iterator[tuple[str, list[Record]]]:
    """Yield what was measured, and the records of it, as they are made."""
    seconds = 0 if args.check_only else args.seconds
    caches = ("hot", "cold") if is_gpu(args.device) else ("hot",)
    for part in args.parts:
        if part == "gan":
            batch = args.batch or training_step.batch_size(args.device)
            for kind in training_step.DISCRIMINATORS:
                if not args.sets or kind in args.sets:
                    yield kind, measure.gan_steps(kind, device=args.device, batch=batch, seconds=4 * seconds)
            continue
        duration = seconds if part == "layers" else seconds / 5
        for chosen in sets(part):
            for variant in args.variants:
                if not args.sets or chosen.name in args.sets:
                    names = _peers(args, part, chosen)
                    records = measure.layer_set(
                        part, chosen, variant, names, device=args.device, seconds=duration, caches=caches
                    )
                    yield f"{chosen.name}, {variant}", records


def sets(part: str) -> list[layer_sets.LayerSet]:
    """Return the layer sets of a part: those of the models, or the points of a grid."""
    return list(layer_sets.load().values()) if part == "layers" else layer_sets.grid(part)


def _peers(args: argparse.Namespace, part: str, chosen: layer_sets.LayerSet) -> list[str]:
    names = [n for n in measure.peers_for(part, chosen, args.device) if n not in args.without]
    return [n for n in names if n in args.peers or n == peers.COPY] if args.peers else names


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    if args.render_only:
        return render([results.load(args.output)] if args.output else results.everything(), args.output)
    machine.pin_threads(args.threads)
    current = results.Results(machine.describe(args.device))
    folder = (args.compare and args.against) or args.output or current.folder
    earlier = results.load(folder) if (folder / results.JSON).exists() else None
    if args.compare and earlier is None:
        print(nothing_to_compare_with(folder))
        return 2
    if earlier is not None and not args.compare:
        current.merge(earlier.records)
    start = perf_counter()
    for what, records in measurements(args):
        current.merge(records)
        for record in records:
            print(_line(record))
        if not (args.compare or args.check_only):
            current.save(folder)  # or all is lost if time runs out
        print(f"{what}: done after {perf_counter() - start:.0f} s", flush=True)
    if args.check_only:
        return int(any(r.error for r in current.records))
    if args.compare:
        return compare.print_comparison(earlier, current)
    current.save(folder)
    return render([current], args.output)


def render(machines: Sequence[results.Results], output: Path | None) -> int:
    """Renew plots and report of these results, and the README and docs/ if they are not kept elsewhere."""
    for found in machines:
        folder = output or found.folder
        pictures = plots.save(found, folder)
        (folder / "report.md").write_text(tables.render(found, pictures))
        print(f"{folder / 'report.md'}")
        print("\n".join(aims(found)))
    for kind in dict.fromkeys(found.kind for found in machines if output in (None, found.folder)):
        page.renew(kind)
    kept = [found for found in results.everything() if found.kind == "cpu" and found.sets("gan")]
    if output is None and kept:
        front.renew(kept[0])
    return 0


def aims(found: results.Results) -> list[str]:
    """Return a line for each aim, with what was measured."""
    return [f"{'yes' if t.holds else 'NO':3} {t.what}: aimed at {t.aim}, measured {t.found}" for t in targets(found)]


def nothing_to_compare_with(folder: Path) -> str:
    """Say what to do on a machine of which no results are kept."""
    known = "".join(f"\n  {found.folder}: {machine.title(found.machine)}" for found in results.everything())
    return (
        f"There are no results of this machine and these versions to compare with, in {folder}.\n"
        f"`make bench` makes them; `make bench-compare` then compares with them. Results of others (--against FOLDER "
        f"compares with them, their machine's speed included):{known or ' none'}"
    )


def _line(r: Record) -> str:
    head = f"{r.part:7} {r.set:22} {r.variant:5} {r.peer:16} {r.phase:19}"
    if r.error:
        return f"{head} NOT TIMED {r.error}"
    copies = f"{r.copies:8.2f} copies" if r.copies else ""
    return f"{head} {r.median:9.3f} ms [{r.q10:.3f} {r.q90:.3f}] of {r.runs:3} {copies}"


if __name__ == "__main__":
    sys.exit(main())
