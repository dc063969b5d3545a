"""Compiles what will be timed, while tests run: the timings then find it on the disk.

    python -m benchmarks.gpu.compile_peers FOLDER --machine NAME UNITS...

UNITS are what the names of units have in common: "sngan_d32 sn", "host". Of each unit that awaits its turn, the peers
that compile something run once, as they do before they are timed: Triton's kernels and torch.compile's.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.against import peers
from benchmarks.gpu import compile_once, measurements, outcomes
from benchmarks.gpu.measurements import Unit
from benchmarks.gpu.outcomes import FILE
from benchmarks.gpu.process import FINISHED
from benchmarks.timing import measure


def compiles(peer: str) -> bool:
    """Whether the first run of a peer has to wait for a compiler."""
    return peer in peers.COMPILED or f"{peers.OURS} triton" in peer


def chosen(units: Iterable[Unit], what: str) -> list[Unit]:
    """Return the units of layer sets whose names have these words in them."""
    return [unit for unit in units if unit.problem is not None and f" {what} " in f" {unit.name} "]


def compile_peers(unit: Unit, known: Collection[str] = ()) -> bool:
    """Let each peer that compiles, and whose figures are not known, run once; return whether all of them did."""
    names = [name for name in unit.peers if compiles(name) and name not in known]
    problem = unit.problem() if unit.problem is not None and names else None
    complete = True
    for name in names if problem is not None else ():
        try:
            peer = measure.prepare(name, problem, empty_cache=False)
            print(f"{unit.name}, {name}: {peer.prepare_seconds:.0f} s", flush=True)
        except Exception as error:  # told by the timing, which meets it again
            complete = False
            print(f"{unit.name}, {name}: {type(error).__name__}: {error}", flush=True)
    return complete


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.compile_peers", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--machine", required=True)
    parser.add_argument("units", nargs="+")
    args = parser.parse_args(words)
    compile_once.install()
    lines = list(outcomes.read(args.folder / FILE))
    done, others = outcomes.measured(lines, args.machine), outcomes.others_measured(lines, args.machine)
    units = [*measurements.compiled_units(), *measurements.units()]
    complete = True
    for what in args.units:
        for unit in chosen(units, what):
            if unit.name not in done:
                complete &= compile_peers(unit, {record["peer"] for record in others.get(unit.name, ())})
                gc.collect()
                torch.cuda.empty_cache()
    return 0 if complete else FINISHED


if __name__ == "__main__":
    sys.exit(main())
