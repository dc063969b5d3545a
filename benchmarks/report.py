"""Measure everything on this machine, write the results and renew the tables of docs/performance.md.

`python -m benchmarks.report` does it all. With --parts, --sets or --peers only a part is measured, and replaces that
part of earlier results of the same machine and versions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from benchmarks import compare, layer_sets, machine, measure, peers, plots, results, tables
from benchmarks.measure import Record
from benchmarks.targets import targets

PARTS = ("layers", *layer_sets.GRID, "gan")
VARIANTS = ("sn", "bssn")
GRID_PEERS = (peers.COPY, peers.TORCH, "foreach")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sets", nargs="+", help="only these layer sets or points of the grid")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--peers", nargs="+", help="only these peers (the plain copy is always there)")
    parser.add_argument("--without", nargs="+", default=[], help="leave out these peers")
    parser.add_argument("--seconds", type=float, default=3, help="about, for each set and variant (%(default)s)")
    parser.add_argument("--batch", type=int, help="of the training steps; 64 on a GPU and 8 on a CPU by default")
    parser.add_argument("--check-only", action="store_true", help="compare results with the reference, time nothing")
    parser.add_argument("--render-only", action="store_true", help="renew plots and tables from earlier results")
    parser.add_argument("--compare", action="store_true", help="compare with the committed results, write nothing")
    parser.add_argument("--output", type=Path, help="folder of the results; by default among the committed ones")
    return parser.parse_args()


def measurements(args: argparse.Namespace) -> Iterator[tuple[str, list[Record]]]:
    """Yield what was measured, and the records of it, as they are made."""
    seconds = 0 if args.check_only else args.seconds
    run = partial(measure.layer_set, device=args.device)
    cold = (False, True) if torch.device(args.device).type == "cuda" else (False,)
    for part in args.parts:
        if part == "gan":
            batch = args.batch or (64 if torch.device(args.device).type == "cuda" else 8)
            for kind in measure.gan.DISCRIMINATORS:
                if not args.sets or kind in args.sets:
                    yield kind, measure.gan_steps(kind, device=args.device, batch=batch, seconds=4 * seconds)
            continue
        found = list(layer_sets.load().values()) if part == "layers" else layer_sets.grid(part)
        for chosen in found:
            for variant in args.variants:
                if not args.sets or chosen.name in args.sets:
                    for state in cold:
                        duration = seconds if part == "layers" else seconds / 5
                        names = _peers(args, part)
                        yield (
                            f"{chosen.name}, {variant}",
                            run(part, chosen, variant, names, seconds=duration, cold=state),
                        )


def _peers(args: argparse.Namespace, part: str) -> list[str]:
    names = [n for n in peers.names(args.device) if n not in args.without]
    if part != "layers":
        names = [n for n in names if n in GRID_PEERS or n.startswith(peers.OURS)]
    if args.peers:
        names = [n for n in names if n in args.peers or n == peers.COPY]
    return names


def main() -> int:
    args = arguments()
    machine.pin_threads(args.threads)
    current = results.Results(machine.describe(args.device))
    folder = args.output or current.folder
    earlier = results.load(folder) if (folder / results.JSON).exists() else None
    if args.render_only and earlier is None:
        sys.exit(f"there are no results in {folder}")
    if earlier is not None and not args.compare:
        current.merge(earlier.records)
    start = perf_counter()
    for what, records in () if args.render_only else measurements(args):
        current.merge(records)
        for record in records:
            print(_line(record))
        print(f"{what}: done after {perf_counter() - start:.0f} s", flush=True)
    if args.check_only:
        return int(any(r.error for r in current.records))
    if args.compare:
        return compare.print_comparison(earlier or sys.exit(f"there are no results in {folder}"), current)
    current.save(folder)
    plots.save(current, folder)
    (folder / "report.md").write_text(tables.render(current) + "\n")
    if args.output is None:
        tables.renew(current, torch.device(args.device).type)
    for t in targets(current):
        print(f"{'yes' if t.holds else 'NO ':3} {t.what}: demanded {t.demanded}, measured {t.found}")
    return 0


def _line(r: Record) -> str:
    head = f"{r.part:7} {r.set:22} {r.variant:5} {r.peer:16} {r.phase:19}"
    if r.error:
        return f"{head} {r.error}"
    copies = f"{r.copies:8.2f} copies" if r.copies else ""
    return f"{head} {r.median:9.3f} ms [{r.q10:.3f} {r.q90:.3f}] of {r.runs:3} {copies}"


if __name__ == "__main__":
    sys.exit(main())
