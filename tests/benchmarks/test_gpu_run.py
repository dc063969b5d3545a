"""`make gpu` where there is no GPU: the whole run, with commands that stand in for the steps that need one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from pretended_gpu import ABOUT

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import files, measurements, outcomes, timetable
from benchmarks.gpu.process import FINISHED, Running, Step
from benchmarks.gpu.timetable import Files
from benchmarks.shown import results
from benchmarks.timing import gpu_plan, machine
from bssn_fast import backends

ROOT = Path(__file__).parents[2]
KEY = machine.key(ABOUT)
TESTS = [f"tests/gpu/test_matrix.py::test_{letter}" for letter in "abc"]


def python(text: str, *words: object) -> list[str]:
    return [sys.executable, "-c", text, *map(str, words)]


def listing(output: Path) -> Step:
    """A step that lists TESTS, as pytest does."""
    line = json.dumps({"kind": "tests", "names": TESTS})
    return Step("names", python("import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n')", output, line), 60)


def trying(output: Path, *names: str, outcome: str = "passed") -> Step:
    """A step that notes an outcome of tests, but of those that are not to run again."""
    text = """
import sys
from pathlib import Path
from types import SimpleNamespace
from benchmarks.gpu import outcomes
folder, left_out, outcome, *names = sys.argv[1:]
for name in names:
    if name not in Path(left_out).read_text().splitlines():
        outcomes.append(
            Path(folder) / outcomes.FILE, "test", name=name, outcome=outcome, seconds=0, why="",
            sources=outcomes.sources_of_test(name, "KEY"),
        )
""".replace("KEY", KEY)
    return Step("tests", python(text, output.parent, output.parent / "not_again.txt", outcome, *names), 60)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs `make gpu` with other stages on a claimed GPU; returns its exit status and what it has appended."""
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(machine, "describe", lambda device: dict(ABOUT))
    monkeypatch.setattr(results, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(Files, "not_again", property(lambda self: self.output / "not_again.txt"))

    def main(stages, *words):
        output = tmp_path / "out"
        output.mkdir(exist_ok=True)
        monkeypatch.setattr(timetable, "stages", lambda files: stages(output / outcomes.FILE))
        status = gpu.main(["--output", str(output), *words])
        (output / "not_again.txt").unlink(missing_ok=True)
        return status, outcomes.of_this_run(list(outcomes.read(output / outcomes.FILE)))

    return main


def steps(lines) -> dict[str, str]:
    return {line["name"]: line["outcome"] for line in lines if line["kind"] == "step"}


def test_stages_follow_one_another_and_files_are_left(run, tmp_path, capsys):
    note = """
import sys, time
time.sleep(float(sys.argv[2]))
print(sys.argv[1])
open(sys.argv[3], "a").write(sys.argv[1])
"""
    order = tmp_path / "order"

    def stages(file):
        return [
            [listing(file), Step("slow", python(note, "slow ", 0.3, order), 60)],
            [Step("quick", python(note, "quick ", 0, order), 60), trying(file, *TESTS)],
        ]

    status, lines = run(stages)
    assert status == 0, capsys.readouterr().out
    assert order.read_text() == "slow quick "
    assert set(steps(lines).values()) == {"done"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {outcomes.FILE, files.LOGS, files.SUMMARY}
    with zipfile.ZipFile(tmp_path / "out" / files.LOGS) as logs:
        assert logs.read("slow.log").decode().endswith("slow \n")
    assert "tests: 3 passed, 0 failed, 0 did not run" in capsys.readouterr().out


def test_what_passed_is_not_repeated_and_what_did_not_run_is_named(run, tmp_path, capsys):
    status, _ = run(
        lambda file: [[listing(file)], [trying(file, TESTS[0])], [trying(file, TESTS[1], outcome="failed")]]
    )
    assert status == 1
    text = (tmp_path / "out" / files.SUMMARY).read_text()
    assert f"did not run: {TESTS[2]}" in text
    assert f"failed: {TESTS[1]}" in text
    assert "1 did not run" in capsys.readouterr().out
    (tmp_path / "kept" / KEY).mkdir(parents=True)
    (tmp_path / "out" / outcomes.FILE).rename(tmp_path / "kept" / KEY / outcomes.FILE)  # as one keeps what came back
    status, lines = run(
        lambda file: [[listing(file)], [trying(file, *TESTS)], [trying(file, *TESTS, outcome="failed")]]
    )
    assert status == 0  # what has run once in this run is not tried again, for better or worse
    assert [line["name"] for line in lines if line["kind"] == "test"] == TESTS[1:]
    assert "tests: 3 passed, 0 failed, 0 did not run" in capsys.readouterr().out


def test_what_failed_in_an_earlier_run_is_told_to_the_tests(run, monkeypatch, tmp_path):
    first = tmp_path / "first.txt"
    monkeypatch.setattr(Files, "first", property(lambda self: first))
    run(lambda file: [[listing(file)], [trying(file, TESTS[0])], [trying(file, TESTS[1], outcome="failed")]])
    monkeypatch.setattr(outcomes, "sources_of_test", lambda name, machine: "other")
    run(lambda file: [[listing(file)], []])
    assert first.read_text().splitlines() == [TESTS[1]]


def test_other_sources_begin_anew(run, monkeypatch):
    run(lambda file: [[listing(file)], [trying(file, *TESTS)]])
    monkeypatch.setattr(outcomes, "sources_of_test", lambda name, machine: "other")
    status, lines = run(lambda file: [[listing(file)], []])
    assert status == 1
    assert outcomes.not_again(lines, KEY) == []


def test_a_failing_step_does_not_end_the_others(run):
    def stages(file):
        return [
            [Step("extension", python("raise SystemExit(5)"), 60), listing(file)],
            [Step("next", python(""), 60), trying(file, *TESTS)],
        ]

    status, lines = run(stages)
    assert status == 1
    assert steps(lines) == {
        "extension": "failed with exit status 5", "names": "done", "next": "done", "tests": "done"
    }  # fmt: skip


def test_a_hang_ends_with_all_that_it_has_started(run, tmp_path):
    text = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""
    pid = tmp_path / "pid"
    hang = Step("hang", python(text, pid), 5)
    _, lines = run(lambda file: [[hang], [Step("next", python(""), 60)]])
    assert steps(lines)["hang"].startswith("stopped after")
    assert steps(lines)["next"] == "done"
    with pytest.raises(ProcessLookupError):
        wait_for_the_end(int(pid.read_text()))


def wait_for_the_end(pid: int) -> None:
    """Ask for a process until there is none, or only its entry: nobody waits for a child whose parent was killed."""
    for _ in range(100_000):
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            raise ProcessLookupError
    raise AssertionError(f"{pid} runs on")


def test_when_the_time_is_up_the_rest_is_named(run, capsys):
    status, lines = run(lambda file: [[listing(file)], [trying(file, *TESTS)]], "--minutes", "0")
    assert status == 1
    assert steps(lines) == {"names": "left out, the time is up", "tests": "left out, the time is up"}


def test_chosen_steps_run_alone(run, capsys):
    """After the first stage, by their names or by the words these begin with."""

    def stages(file):
        return [
            [listing(file)],
            [Step(name, python(""), 60) for name in ("tests cuda", "tests triton", "testsuite")],
            [Step("measurements", python(""), 60)],
            [Step(name, python(""), 60) for name in ("profile a", "profile b")],
        ]

    _, lines = run(stages, "--only", "tests cuda", "profile")
    assert set(steps(lines)) == {"names", "tests cuda", "profile a", "profile b"}
    _, lines = run(stages, "--only", "tests")
    assert set(steps(lines)) == {"names", "tests cuda", "tests triton"}
    status, _ = run(stages, "--only", "profil")
    assert status == 2
    assert "no step is called profil; there are: tests cuda, tests triton" in capsys.readouterr().err


def test_what_persists_takes_the_time_that_is_spare(monkeypatch, run):
    """Timings go on while nobody behind them lacks time; the last stage, which takes what is left, counts for none."""
    until = {}

    class Ended:
        outcome, seconds = "done", 0.0

        def __init__(self, step, log, deadline, at_least):
            self.step = step
            until[step.name] = at_least, deadline

        def poll(self):
            return True

    monkeypatch.setattr(gpu, "Running", Ended)
    run(
        lambda file: [
            [Step("timings", [], 20, persists=True), Step("others", [], 20)],
            [Step("next", [], 10)],
            [Step("last", [], 600)],
        ]
    )
    at_least, deadline = until["timings"]
    assert at_least == deadline - 10
    assert until["others"][0] == until["next"][0] == 0


def test_a_step_may_last_longer_where_time_is_spare(tmp_path):
    running = Running(
        Step("long", python("import time; time.sleep(600)"), 0), tmp_path / "log", float("inf"), float("inf")
    )
    assert not running.poll()
    running.end()


def test_no_step_outlasts_the_run(tmp_path):
    """Its end is the deadline, where that comes before its own time is up."""
    late = Running(Step("late", python("import time; time.sleep(600)"), 500), tmp_path / "late.log", deadline=0.0)
    assert late.poll()
    assert late.outcome == "stopped after 0 s"


def test_the_timetable_ends_in_time(monkeypatch):
    """The longest times of all stages but the last, which takes what is left. Compiled before, the first needs 30 s."""
    monkeypatch.setattr(timetable.shutil, "which", lambda name: f"/bin/{name}")
    stages = timetable.stages(Files(Path("out"), Path("scratch"), KEY))
    limits = [max(step.seconds for step in stage) for stage in stages if stage]
    usual = 30 + sum(limits[1:-1])
    assert usual < 60 * timetable.MINUTES - gpu.RESERVE - gpu.FEWEST_SECONDS
    assert timetable.MINUTES * 60 <= 9 * 60 + 20


@pytest.mark.parametrize("status", [1, -9])
def test_what_persists_is_started_again_when_it_dies(tmp_path, status):
    text = f"""
import os, sys
open(sys.argv[1], "a").write("x")
if len(open(sys.argv[1]).read()) == 3:
    sys.exit({FINISHED})
os._exit({status}) if {status} > 0 else os.kill(os.getpid(), {-status})
"""
    begun = tmp_path / "begun"
    step = Step("units", python(text, begun), 60, persists=True)
    running = Running(step, tmp_path / "log", deadline=float("inf"))
    while not running.poll():
        pass
    assert (begun.read_text(), running.outcome) == ("xxx", f"failed with exit status {FINISHED}")


def test_what_dies_for_ever_is_given_up(tmp_path):
    step = Step("units", python("raise SystemExit(1)"), 60, persists=True)
    running = Running(step, tmp_path / "log", deadline=float("inf"))
    while not running.poll():
        pass
    assert (tmp_path / "log").read_text().count("SystemExit") == Running.MOST_STARTS


def test_without_a_gpu_one_line_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "finds no GPU" in line


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(gpu.NEEDED, "no_such_module", "no-such-package")
    assert "pip install" in gpu.why_not()
    assert "no-such-package" in gpu.why_not()


def test_every_command_is_one_that_its_program_understands(monkeypatch, tmp_path):
    """The options of all steps, on a machine that has NVIDIA's tools."""
    monkeypatch.setattr(timetable.shutil, "which", lambda name: f"/bin/{name}")
    stages = timetable.stages(Files(tmp_path, tmp_path, KEY))
    found = {step.name: step for stage in stages for step in stage}
    compilers = [f"compile {name} {variant}" for name in gpu_plan.SETS for variant in gpu_plan.VARIANTS]
    compilers.append("compile host")
    assert list(found) == [
        "extension", "names", "tests cuda", "tests triton", "tests compiled", *compilers, "measurements",
        "compiled peers", "profile sngan_d32", "profile bsn_resnet_d128", "memcheck", "racecheck",
    ]  # fmt: skip
    for step in found.values():  # what one has compiled the others find
        assert all(step.environment[name] == value for name, value in timetable.ENVIRONMENT.items())
    words = [*found["measurements"].command[3:], "--compiled"]
    monkeypatch.setattr(measurements, "run", lambda units, folder, machine, longest: len(units))
    monkeypatch.setattr(measurements, "units", lambda: [])
    monkeypatch.setattr(measurements, "compiled_units", lambda: [1])
    assert measurements.main(found["measurements"].command[3:]) == 0
    assert measurements.main(words) == 1
    assert (found["memcheck"].command[0], found["profile sngan_d32"].command[0]) == (
        "/bin/compute-sanitizer",
        "/bin/ncu",
    )
    for name in ("memcheck", "racecheck"):
        assert "tests/gpu/sanitized.py" in found[name].command
        assert found[name].command[-1] in backends.NAMES


def test_tools_are_found_beside_the_path(monkeypatch, tmp_path):
    monkeypatch.setattr(timetable, "TOOLS", (str(tmp_path / "none"), str(tmp_path / "ncu-*")))
    assert "ncu" in timetable.missing_tools()
    for version in ("1", "2"):
        tool = tmp_path / f"ncu-{version}" / "ncu"
        tool.parent.mkdir()
        tool.touch(0o755)
    assert timetable.profile("sngan_d32").command[0] == str(tool)


def test_a_table_that_fails_does_not_end_the_run(run, monkeypatch, capsys):
    def fail(output, lines, machine):
        raise KeyError("a column")

    monkeypatch.setattr(files, "write_results", fail)
    status, lines = run(lambda file: [[listing(file)], [trying(file, *TESTS)]])
    assert status == 0
    assert steps(lines) == {"names": "done", "tests": "done"}
    assert "no report: KeyError: 'a column'" in capsys.readouterr().out
