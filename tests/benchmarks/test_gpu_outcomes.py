"""The tests that need a GPU: which there are, what becomes of them, and what of it is kept."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pretended_gpu import ABOUT

from benchmarks.against import peers
from benchmarks.gpu import outcomes, timetable
from benchmarks.gpu.timetable import Files
from benchmarks.timing import machine

ROOT = Path(__file__).parents[2]
KEY = machine.key(ABOUT)


def test_all_tests_for_gpus_are_listed_here(tmp_path):
    """By the very command of `make gpu`."""
    step = timetable.names(Files(tmp_path, tmp_path, KEY))
    done = subprocess.run(
        step.command, cwd=ROOT, env={**os.environ, **step.environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = outcomes.all_tests(list(outcomes.read(tmp_path / outcomes.FILE)))
    for file in (ROOT / "tests" / "gpu").glob("test_*.py"):
        assert any(name.startswith(f"tests/gpu/{file.name}::") for name in names)
    for way in ("triton-single", "triton-phases", "cuda-single", "cuda-phases"):
        assert any(way in name for name in names)
    assert "::test_matrix[" in names[0]


def test_they_do_not_run_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_streams.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout


TESTS_OF_ALL_KINDS = """
import os, time
import pytest

def test_passes():
    pass

def test_fails():
    raise ValueError("the reason")

def test_skips():
    pytest.skip("no second GPU")

def test_dies():
    os._exit(11)

def test_hangs():
    time.sleep(600)

def test_comes_last():
    pass

def test_passed_before():
    raise AssertionError
"""


def test_outcomes_of_tests_are_appended_as_they_come(tmp_path):
    """Also of those that end their process or never end, after which the others go on in a new one."""
    (tmp_path / "test_kinds.py").write_text(TESTS_OF_ALL_KINDS)
    (tmp_path / "not_again.txt").write_text("test_kinds.py::test_passed_before\n")
    command = timetable.tests("cuda", Files(tmp_path, tmp_path, KEY), 60).command
    command = [word for word in command if word not in ("tests/gpu", "--confcutdir=tests/gpu")]
    command[command.index("--timeout") + 1] = "5"
    done = subprocess.run(
        [*command, "-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = outcomes.latest(outcomes.read(tmp_path / outcomes.FILE), "test")
    assert {name.split("::")[1]: line["outcome"] for name, line in found.items()} == {
        "test_passes": "passed", "test_fails": "failed", "test_skips": "skipped", "test_dies": "failed",
        "test_hangs": "failed", "test_comes_last": "passed",
    }, done.stdout + done.stderr  # fmt: skip
    assert "the reason" in found["test_kinds.py::test_fails"]["why"]
    assert "crashed" in found["test_kinds.py::test_hangs"]["why"]


ORDERED = """
import pytest

WAYS = pytest.mark.parametrize("way", ["cuda-keep", "cuda-single"])

@WAYS
def test_a(way):
    pass

@WAYS
def test_matrix(way):
    pass

@WAYS
def test_z(way):
    pass
"""


def test_what_failed_before_comes_first_and_other_plans_last(tmp_path):
    """In all workers, also those that begin when others have appended outcomes: by a file that stays as it is."""
    (tmp_path / "test_order.py").write_text(ORDERED)
    file = tmp_path / outcomes.FILE
    for name, outcome in (("a", "failed"), ("a", "passed"), ("matrix", "passed"), ("z", "failed")):
        outcomes.append(
            file, "test", name=f"test_order.py::test_{name}[cuda-single]", outcome=outcome, sources="others"
        )
    outcomes.append(file, "run", machine=KEY, about={})
    first = Files(tmp_path, tmp_path, KEY).first
    first.write_text("\n".join(outcomes.failed_before(outcomes.read(file))))
    command = timetable.tests("cuda", Files(tmp_path, tmp_path, KEY), 60).command
    command = [word for word in command if word not in ("tests/gpu", "--confcutdir=tests/gpu")]
    command[command.index("-n") + 1] = "0"
    done = subprocess.run(
        [*command, "-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    ran = [line["name"].split("::test_")[1] for line in outcomes.of_this_run(list(outcomes.read(file)))]
    assert ran == [
        "z[cuda-single]", "matrix[cuda-single]", "a[cuda-single]", "matrix[cuda-keep]", "a[cuda-keep]", "z[cuda-keep]"
    ], done.stdout + done.stderr  # fmt: skip


def test_all_passed_before_is_no_failure(tmp_path):
    (tmp_path / "test_one.py").write_text("def test_one():\n    raise AssertionError\n")
    (tmp_path / "not_again.txt").write_text("test_one.py::test_one\n")
    command = timetable.tests("cuda", Files(tmp_path, tmp_path, KEY), 60).command
    command = [word for word in command if word not in ("tests/gpu", "--confcutdir=tests/gpu")]
    done = subprocess.run(
        [*command, "-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_worker_whose_gpu_is_spoiled_ends(monkeypatch):
    """Or all tests behind a kernel's error would fail with it."""
    spec = importlib.util.spec_from_file_location("conftest_of_gpu", ROOT / "tests" / "gpu" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    ended, answers = [], []

    def synchronize():
        answers.append(True)
        if len(answers) > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(os, "_exit", ended.append)
    for failed in (False, True, False):  # the second leaves a GPU that answers, the third, which passes, none
        conftest.pytest_runtest_logreport(SimpleNamespace(failed=failed))
        conftest.pytest_runtest_logfinish("a")
    assert (len(answers), ended) == (2, [3])


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    file = tmp_path / outcomes.FILE
    outcomes.append(file, "run", machine=KEY, about={})
    with file.open("a") as out:
        out.write('{"kind": "test", "na')
    assert [line["kind"] for line in outcomes.read(file)] == ["run"]
    outcomes.append(file, "step", name="x", outcome="done", seconds=1)
    assert [line["kind"] for line in outcomes.read(file)] == ["run", "step"]


def test_the_hash_knows_sources_and_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(outcomes, "ROOT", tmp_path)
    source = tmp_path / "csrc" / "a.cu"
    source.parent.mkdir()
    found, others = set(), set()
    for text, key in (("1", "x"), ("2", "x"), ("2", "y")):
        source.write_text(text)
        outcomes.hash_of.cache_clear()
        found.add(outcomes.sources_of_test("tests/gpu/test_matrix.py::test_a", key))
        others.add(outcomes.hash_of(key, *outcomes.OTHERS))
    outcomes.hash_of.cache_clear()
    assert len(found) == 3
    assert len(others) == 2  # our kernels are nothing to the other peers


def test_who_is_timed_anew():
    every = [*peers.names("cpu"), *peers.COMPILED, "torch graph", "bssn_fast cuda graph"]
    assert {name for name in every if outcomes.is_retimed(name)} == {
        peers.COPY,
        "bssn_fast cpu",
        "bssn_fast cuda graph",
    }
