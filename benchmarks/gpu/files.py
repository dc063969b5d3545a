"""The few flat files that a run leaves: outcomes, results, a report, a summary, all logs in one, the extension."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import outcomes
from benchmarks.gpu.outcomes import Line

MOST = 8
ORDER = ("compiled", "layers", "host", "training", "launches")
"""Of the kinds of units in results, by the first words of their names: records replace those of the same case."""
LOGS, SUMMARY, REPORT = "logs.zip", "summary.txt", "report.md"


def write(output: Path, logs: Path, machine: str) -> None:
    """Write all files but the outcomes, which are there, anew; what is written after each stage survives the next."""
    lines = list(outcomes.read(output / outcomes.FILE))
    with zipfile.ZipFile(output / LOGS, "w", zipfile.ZIP_DEFLATED) as packed:
        for log in sorted(logs.glob("*.log")):
            packed.write(log, log.name)
    (output / SUMMARY).write_text("\n".join(summary(lines, machine)) + "\n")
    try:
        write_results(output, lines, machine)
    except Exception as error:  # the figures are kept already, and the GPU's time must not be lost over a table
        print(f"no report: {type(error).__name__}: {error}", flush=True)


def write_results(output: Path, lines: Sequence[Line], machine: str) -> None:
    """Write what was measured as the same files that `make bench` writes, without plots."""
    from benchmarks.shown import tables
    from benchmarks.shown.results import Results
    from benchmarks.timing.record import Record

    units = outcomes.measured(lines, machine)
    about = [line["about"] for line in lines if line["kind"] == "run"]
    if units and about:
        results = Results(about[-1])
        # Peers that take turns with torch.compile's are there for its sake: elsewhere they have met all others.
        for line in sorted(units.values(), key=lambda line: ORDER.index(line["name"].split()[0])):
            records = [Record(**record) for record in line["records"]]
            if line["name"].startswith("launches"):
                results.set_launches(records)
            else:
                results.merge(records)
        results.save(output)
        (output / REPORT).write_text(tables.render(results))


def summary(lines: Sequence[Line], machine: str) -> list[str]:
    """Return the machine, what became of each step, and the names of all tests that failed or did not run."""
    text = [f"{name}: {value}" for line in lines if line["kind"] == "run" for name, value in line["about"].items()]
    text = list(dict.fromkeys(text))
    steps = [line for line in outcomes.of_this_run(lines) if line["kind"] == "step"]
    text += [f"{line['name']}: {line['outcome']} in {line['seconds']:.0f} s" for line in steps]
    units = outcomes.measured(lines, machine)
    text.append(f"{len(units)} units were timed")
    failed = {name: line["error"] for name, line in outcomes.latest(lines, "unit").items() if "error" in line}
    text += [f"unit {name} failed: {error}" for name, error in failed.items()]
    found = current_outcomes(lines, machine)
    for outcome in ("failed", "skipped"):
        text += [f"{outcome}: {name}: {line['why']}" for name, line in found.items() if line["outcome"] == outcome]
    missing = not_run(lines, machine)
    text += [f"did not run: {name}" for name in missing]
    counts = {outcome: sum(line["outcome"] == outcome for line in found.values()) for outcome in ("passed", "failed")}
    text.append(f"tests: {counts['passed']} passed, {counts['failed']} failed, {len(missing)} did not run")
    return text


def current_outcomes(lines: Sequence[Line], machine: str) -> dict[str, Line]:
    """Return the tests' last outcomes with the sources as they are now, by name."""
    tests = outcomes.latest(lines, "test").items()
    return {name: line for name, line in tests if line["sources"] == outcomes.sources_of_test(name, machine)}


def not_run(lines: Sequence[Line], machine: str) -> list[str]:
    """Return the names of the tests without an outcome."""
    found = current_outcomes(lines, machine)
    return [name for name in outcomes.all_tests(lines) if name not in found]
