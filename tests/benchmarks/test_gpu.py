"""`make gpu` where there is no GPU: every step, with a GPU that is only claimed and commands that do not run."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, report
from benchmarks.against import peers
from benchmarks.shown import results
from benchmarks.timing import machine
from benchmarks.timing.measure import Record
from benchmarks.work.layer_sets import GRID, grid, load

SETS = {*load(), *(point.name for kind in GRID for point in grid(kind))}


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Makes `gpu.main` run on a claimed GPU; the list of commands that it gives, with their environment."""
    found = []

    def run(command, *, stdout, env, timeout, **options):
        found.append((command, env))
        stdout.write("cuda  triton     available, the default\n")
        return subprocess.CompletedProcess(command, 0)

    about = {"device": "NVIDIA H200", "torch": "2.11.0", "cuda": "13.0", "threads": 16}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(machine, "describe", lambda device: about)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(
        gpu, "subprocess", SimpleNamespace(run=run, STDOUT=-2, TimeoutExpired=subprocess.TimeoutExpired)
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    return found


def test_every_command_is_one_that_its_program_understands(commands, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "names", lambda device: [*peers._ANYWHERE, *peers._ON_CUDA, *OURS])
    assert gpu.main() == 0
    for command, env in commands:
        assert env["PYTHONPATH"].startswith(str(tmp_path))
        if command[1:3] != ["-m", "benchmarks.report"]:
            continue
        args = report.arguments(command[3:])
        assert set(args.sets or ()) <= SETS
        for part in set(args.parts) - {"gan"}:
            for chosen in load().values() if part == "layers" else grid(part):
                if not args.sets or chosen.name in args.sets:
                    assert set(report._peers(args, part, chosen)) > {peers.COPY}, command
        assert args.output.is_relative_to(tmp_path)
    given = [" ".join(command) for command, _ in commands]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert any(f"--tool {tool}" in text for text in given)
    assert any("tests/gpu" in text and "pytest" in text for text in given)
    summary = (tmp_path / "benchmarks/results/nvidia-h200/torch-2.11.0/summary.txt").read_text()
    assert "nothing failed" in summary
    assert "cuda  triton     available" in summary


OURS = ["bssn_fast triton", "bssn_fast triton graph", "bssn_fast cuda", "bssn_fast cuda graph"]


def test_what_has_no_time_left_is_named(commands, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "modes", "--minutes", "0"])
    assert gpu.main() == 1
    assert not commands
    assert "cuda-phases: left out, the time is up" in capsys.readouterr().out


def test_ways_are_compared_with_the_floor(tmp_path):
    def record(phase, ms):
        return Record("layers", "biggan_d128", "bssn", "bssn_fast triton", phase, 1, 350.0, median=ms, copies=3.0)

    found = results.Results({}, [record("forward", 0.25), record("backward", 0.5)])
    found.save(tmp_path / "triton-single")
    assert gpu.comparison(tmp_path)[2:] == ["| biggan_d128 | hot | triton-single | 250.0 | 2.00 | 500.0 | 1.50 |"]


def test_help_and_unknown_steps():
    script = Path(gpu.__file__)
    run = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert "--minutes" in run.stdout
    run = subprocess.run([sys.executable, str(script), "build"], capture_output=True, text=True, check=False)
    if not torch.cuda.is_available():
        assert run.returncode != 0
        assert "finds no GPU" in run.stderr
