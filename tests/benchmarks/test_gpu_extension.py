"""What was compiled before is tried, else it is compiled: with compilers that are not asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from pretended_gpu import ABOUT

from benchmarks.gpu import extension, prepare
from benchmarks.timing import machine

ROOT = Path(__file__).parents[2]
KEY = machine.key(ABOUT)


@pytest.fixture
def builds(monkeypatch, tmp_path):
    """Where extensions are looked for, with a list of what was built; `works` is the last argument's answer."""
    monkeypatch.setattr(extension, "ROOT", tmp_path)
    monkeypatch.setattr(extension, "PREPARED", tmp_path / "build" / "gpu")
    for name in ("setup.py", "csrc/a.cu"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    built = []

    def build():
        built.append(True)
        extension.installed().parent.mkdir(exist_ok=True)
        extension.installed().write_text("built")

    monkeypatch.setattr(extension, "build", build)
    monkeypatch.setattr(extension, "works", lambda: extension.installed().read_text() in ("built", "prepared"))
    monkeypatch.setattr(sys, "argv", ["extension", str(tmp_path / "out")])
    return built


def test_what_was_compiled_before_is_tried_first(builds, tmp_path):
    name = extension.name()
    extension.PREPARED.mkdir(parents=True)
    (extension.PREPARED / name).write_text("prepared")
    assert extension.main() == 0
    assert not builds
    assert extension.installed().read_text() == (tmp_path / "out" / name).read_text() == "prepared"


@pytest.mark.parametrize("change", ["sources", "broken"])
def test_what_does_not_fit_is_compiled(builds, tmp_path, change):
    name = extension.name()
    extension.PREPARED.mkdir(parents=True)
    (extension.PREPARED / name).write_text("prepared" if change == "sources" else "broken")
    if change == "sources":
        (tmp_path / "csrc" / "a.cu").write_text("2")
    assert extension.main() == 0
    assert builds == [True]
    now = extension.name()
    assert (tmp_path / "out" / now).read_text() == "built"


def test_it_is_compiled_for_this_gpu_alone(monkeypatch):
    given = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        extension.subprocess, "run", lambda command, **how: given.append((command, how["env"])) or Done()
    )
    assert extension.build() is None
    ((command, environment),) = given
    assert (command[1], environment["BSSN_FAST_CUDA_ARCHS"]) == ("setup.py", "90")
    Done.returncode = 1
    assert "setup.py ended with 1" in extension.build()


class Done:
    returncode = 0


@pytest.mark.parametrize(("found", "status"), [("compiled for sm_90", 0), ("pip could not build it, see above", 1)])
def test_preparing_says_what_came_of_it(monkeypatch, tmp_path, capsys, found, status):
    monkeypatch.setattr(extension, "PREPARED", tmp_path / "gpu")
    monkeypatch.setattr(prepare, "compile_for", lambda arch, target: found)
    extension.PREPARED.mkdir()
    for name in ("extension-0123.abi3.so", "notes.txt"):
        (extension.PREPARED / name).touch()
    assert prepare.main([]) == status
    assert [path.name for path in extension.PREPARED.iterdir()] == ["notes.txt"]
    assert capsys.readouterr().out == f"{found}\n"
