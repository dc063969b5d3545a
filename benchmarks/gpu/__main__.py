"""`make gpu`: correctness and speed on this machine's GPU, offline, in nine minutes.

    make gpu                      everything; its files lie in benchmarks/results, in a folder for GPU and torch
    make gpu OUTPUT=folder        there instead: at most eight files, no folders
    make gpu ARGS="--minutes 30"  with more time
    make gpu ARGS="--only 'tests cuda' profile measurements"   these steps alone, by their names or the first words

Every outcome and figure is in outcomes.jsonl as soon as it is known. A later run goes on where an earlier one ended, if
that file is in the folder for the GPU, in OUTPUT or given by --earlier: what passed or was timed with the same sources
is not repeated. Uses the Python that runs it and the torch that is there; installs nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu import files as kept
from benchmarks.gpu import outcomes, timetable
from benchmarks.gpu.outcomes import FILE, ROOT
from benchmarks.gpu.process import Running, Step
from benchmarks.gpu.timetable import MINUTES, Files

NEEDED = {  # modules, and what to install
    "pytest": "pytest",
    "xdist": "pytest-xdist",
    "pytest_timeout": "pytest-timeout",
    "scipy": "scipy",
    "tabulate": "tabulate",
}
FEWEST_SECONDS = 5
RESERVE = 15
"""Seconds for writing the files."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for the files")
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], help="folders of runs to continue")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="when to end (%(default).2f)")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="steps to run, after the first stage")
    return parser.parse_args(words)


def why_not() -> str | None:
    """Return why nothing can be run here, in a line."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch: run `make gpu PYTHON=...` with a Python that has torch with CUDA"
    import torch

    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} of {sys.executable} finds no GPU here: run `make gpu` on a machine with one, "
            "or `make gpu PYTHON=...` with a Python whose torch was built for it"
        )
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    return f"{sys.executable} lacks {', '.join(missing)}: `pip install {' '.join(missing)}`" if missing else None


def run(stages: Sequence[Sequence[Step]], files: Files, minutes: float, deadline: float) -> None:
    """Run the stages until the time is up; append each step's outcome, and write the files after each stage."""
    longer = max(1.0, minutes / MINUTES)
    stages = [[replace(step, seconds=longer * step.seconds) for step in stage] for stage in stages]
    for n, stage in enumerate(stages):
        lines = list(outcomes.read(files.output / FILE))
        files.not_again.write_text("\n".join(outcomes.not_again(lines, files.machine)))
        files.first.write_text("\n".join(outcomes.failed_before(lines)))
        run_stage(stage, files, deadline, deadline - needed(stages[n + 1 :]))
        kept.write(files.output, files.scratch, files.machine)


def needed(stages: Sequence[Sequence[Step]]) -> float:
    """Return the seconds that stages may take; the last one takes what is left."""
    return sum(max((step.seconds for step in stage), default=0) for stage in stages[:-1])


def run_stage(stage: Sequence[Step], files: Files, deadline: float, spare: float) -> None:
    """Run steps side by side. None outlasts its time, nor this function, whatever ends it.

    spare: until when the stage may last at the cost of no other, for steps that persist: each unit has a limit there.
    """
    running: list[Running] = []
    try:
        for step in stage:
            if deadline - time.monotonic() < FEWEST_SECONDS:
                _note(files, step, "left out, the time is up", 0)
                continue
            log = files.scratch / f"{step.name.replace(' ', '-')}.log"
            running.append(Running(step, log, deadline, spare if step.persists else 0.0))
        while running:
            for one in [one for one in running if one.poll()]:
                running.remove(one)
                _note(files, one.step, str(one.outcome), one.seconds)
            time.sleep(0.05)
    finally:
        for one in running:
            one.end()


def _note(files: Files, step: Step, outcome: str, seconds: float) -> None:
    outcomes.append(files.output / FILE, "step", name=step.name, outcome=outcome, seconds=round(seconds, 1))
    print(f"{step.name}: {outcome} in {seconds:.0f} s", flush=True)


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    deadline = time.monotonic() + 60 * args.minutes - RESERVE  # to import torch may take half a minute of it
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    from benchmarks.shown.results import FOLDER
    from benchmarks.timing import machine

    about = machine.describe("cuda")
    key = machine.key(about)
    output = (args.output or FOLDER / key).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        files = Files(output, Path(scratch), key)
        stages, problem = timetable.chosen(timetable.stages(files), args.only)
        if problem is not None:
            print(problem, file=sys.stderr)
            return 2
        outcomes.adopt(output / FILE, [folder / FILE for folder in (FOLDER / key, *args.earlier)])
        outcomes.append(output / FILE, "run", machine=key, about=about)
        for tool in timetable.missing_tools():
            print(f"{tool} is not installed: what it would tell is left out")
        run(stages, files, args.minutes, deadline)
    lines = list(outcomes.read(output / FILE))
    text = kept.summary(lines, key)
    print("\n".join(line for line in text if not line.startswith("did not run: ")))  # that can be hundreds
    shown = output.relative_to(ROOT) if output.is_relative_to(ROOT) else output
    print(f"results, with the names of tests that did not run in {kept.SUMMARY}: {shown}")
    return int(not complete(lines, key))


def complete(lines: Sequence[outcomes.Line], machine: str) -> bool:
    """Whether all tests have run and passed, and every step of this run came to its end."""
    steps = [line for line in outcomes.of_this_run(lines) if line["kind"] == "step"]
    tests = kept.current_outcomes(lines, machine).values()
    return (
        all(line["outcome"] == "done" for line in steps)
        and bool(outcomes.all_tests(lines))
        and not kept.not_run(lines, machine)
        and all(line["outcome"] != "failed" for line in tests)
    )


if __name__ == "__main__":
    sys.exit(main())
