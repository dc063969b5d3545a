"""Outcomes and figures, appended to one file as they come: JSON, one object a line, told apart by `kind`.

    run    machine, about: a run begins
    test   name, outcome (passed, failed, skipped), seconds, why, sources
    unit   name, records or error, sources, sources_of_others: what `measurements` has timed together
    begun  name: a unit that has begun; without a later line of it, its process has died
    step   name, outcome, seconds
    tests  names: all tests that there are

`sources` is a hash of the code that the outcome depends on, and of the machine: what has it again need not run again.
`sources_of_others` is that of the peers that are not ours, which a change of our kernels leaves as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = "outcomes.jsonl"

PACKAGE = ("csrc/**/*", "bssn_fast/**/*.py")
HELPERS = ("tests/gpu/conftest.py", "tests/gpu/ways.py", "tests/support.py", "tests/backends/matrix.py")
TIMING = ("benchmarks/work/*", "benchmarks/against/*", "benchmarks/timing/*", "benchmarks/gpu/measurements.py")

OTHERS = (*TIMING, "bssn_fast/reference.py", "bssn_fast/layout.py")
"""What the peers that are not ours are made of."""

Line = dict[str, Any]


def append(file: Path, kind: str, **fields: object) -> None:
    """Add a line. It is in the file when this returns, whatever becomes of the process."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as out:
        out.seek(max(0, out.seek(0, os.SEEK_END) - 1))
        cut_off = out.read() not in (b"", b"\n")
        out.write(b"\n" * cut_off + json.dumps({"kind": kind, **fields}).encode() + b"\n")


def read(*files: Path) -> Iterator[Line]:
    """Yield the lines of all files that exist; a last line that was not finished is left out."""
    for file in files:
        for text in file.read_text().splitlines() if file.exists() else ():
            try:
                yield json.loads(text)
            except json.JSONDecodeError:
                continue


def latest(lines: Iterable[Line], kind: str) -> dict[str, Line]:
    """Return the last line of each name."""
    return {line["name"]: line for line in lines if line["kind"] == kind}


def sources(machine: str, *patterns: str) -> str:
    """Return a hash of the package's sources, of the files that `patterns` match as well, and of a machine's name."""
    return hash_of(machine, *PACKAGE, *patterns)


@cache
def hash_of(machine: str, *patterns: str) -> str:
    """Return a hash of the files that `patterns` match, and of a machine's name."""
    digest = hashlib.sha256(machine.encode())
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path.name != "_build_info.py":
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def sources_of_test(name: str, machine: str) -> str:
    """Return the hash for a test, by its name: its file and what all tests for GPUs share count too."""
    file = name.split("::")[0]
    return sources(machine, *HELPERS, file, *(TIMING if file.endswith("test_measured.py") else ()))


def of_this_run(lines: Sequence[Line]) -> list[Line]:
    """Return the lines behind the last beginning of a run."""
    begin = max((j for j, line in enumerate(lines) if line["kind"] == "run"), default=-1)
    return list(lines[begin + 1 :])


def passed(lines: Iterable[Line], machine: str) -> list[str]:
    """Return the names of the tests that passed with the sources as they are now."""
    return [
        name
        for name, line in latest(lines, "test").items()
        if line["outcome"] == "passed" and line["sources"] == sources_of_test(name, machine)
    ]


def not_again(lines: Sequence[Line], machine: str) -> list[str]:
    """Return the names of the tests that have passed, or that this run has tried: a failure stays one."""
    return list(dict.fromkeys([*passed(lines, machine), *latest(of_this_run(lines), "test")]))


def failed_before(lines: Iterable[Line]) -> list[str]:
    """Return the names of the tests that failed when they ran last, with whatever sources: they run first."""
    return [name for name, line in latest(lines, "test").items() if line["outcome"] == "failed"]


def deadly(lines: Sequence[Line], machine: str) -> list[str]:
    """Return the names of the tests, with the sources as they are, that ended their process or the GPU's use to it.

    One that hangs is among them, as it is ended with its process.
    """
    return [
        name
        for name, line in latest(lines, "test").items()
        if line["outcome"] == "failed"
        and ("crashed while running" in line["why"] or "CUDA error" in line["why"])
        and line["sources"] == sources_of_test(name, machine)
    ]


def timed_before(lines: Iterable[Line]) -> set[str]:
    """Return the names of the units that were ever timed, with whatever sources: the others come first."""
    return {line["name"] for line in lines if line["kind"] == "unit" and "error" not in line}


def all_tests(lines: Iterable[Line]) -> list[str]:
    """Return the names of all tests, as the last list of them has it."""
    lists = [line["names"] for line in lines if line["kind"] == "tests"]
    return lists[-1] if lists else []


def measured(lines: Iterable[Line], machine: str) -> dict[str, Line]:
    """Return the units, by name, that were timed with the sources as they are now."""
    now = sources(machine, *TIMING)
    units = latest(lines, "unit").items()
    return {name: line for name, line in units if line["sources"] == now and "error" not in line}


def others_measured(lines: Iterable[Line], machine: str) -> dict[str, list[dict[str, Any]]]:
    """Return the records, by unit, of the peers that are not ours and of whose sources nothing has changed."""
    now = hash_of(machine, *OTHERS)
    units = {name: line for name, line in latest(lines, "unit").items() if line.get("sources_of_others") == now}
    return {
        name: [r for r in line.get("records", ()) if r["error"] is None and not is_retimed(r["peer"])]
        for name, line in units.items()
    }


def is_retimed(peer: str) -> bool:
    """Whether a peer is timed anew with each change of the package: ours, and the copy, which tells of the machine."""
    return peer == "copy" or peer.startswith("bssn_fast")


def adopt(file: Path, earlier: Iterable[Path]) -> None:
    """Begin a new file with what earlier runs have found, so that it tells all."""
    if not file.exists():
        for line in list(read(*earlier)):
            if line["kind"] in ("test", "unit"):
                append(file, **line)
