"""What is said where the compiled extension is missing."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import bssn_fast
from bssn_fast import backends
from bssn_fast.backends import extension

ROOT = Path(__file__).parents[1]


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.delenv("BSSN_FAST_BACKEND", raising=False)
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "not_built", {"cpu": "no C++ compiler was found"})
    backends.forget()
    yield
    backends.forget()


def install(folder: Path) -> None:
    """Make `folder` look like one that the package was installed to."""
    (folder / "bssn_fast").mkdir(parents=True)
    (folder / "bssn_fast" / "__init__.py").write_text("")
    (folder / "bssn_fast-0.1.0.dist-info").mkdir()
    (folder / "bssn_fast-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.4\nName: bssn_fast\n")


def test_the_reference_in_place_of_the_kernels_warns_once(without_extension):
    with pytest.warns(RuntimeWarning, match=r"work on cpu.*slower.*cpu: .*no C\+\+ compiler.*BACKEND=reference"):
        model = bssn_fast.apply(nn.Linear(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(1, 3))
        bssn_fast.apply(nn.Linear(3, 2))


def test_the_reference_that_was_asked_for_does_not_warn(without_extension, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bssn_fast.apply(nn.Linear(3, 2), backend="reference")(torch.randn(1, 3))
        monkeypatch.setenv("BSSN_FAST_BACKEND", "reference")
        bssn_fast.apply(nn.Linear(3, 2))(torch.randn(1, 3))


def test_a_source_folder_that_hides_the_installed_package_is_named(without_extension, monkeypatch, tmp_path):
    assert "no C++ compiler" in extension.why_missing()
    install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    message = extension.why_missing()
    assert str(extension.FOLDER) in message
    assert str(tmp_path / "bssn_fast") in message
    assert "start Python in another folder" in message


def test_an_editable_installation_hides_nothing(monkeypatch, tmp_path):
    install(tmp_path)
    shutil.rmtree(tmp_path / "bssn_fast")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert extension.hidden_installation() is None


def test_the_extension_of_another_copy_is_not_used(monkeypatch, tmp_path):
    """An editable installation of another checkout offers its own where this one has none."""
    for name in ("_C", "_build_info"):
        (tmp_path / f"{name}.py").write_text("NOT_BUILT = {}\n")
        monkeypatch.delitem(sys.modules, f"bssn_fast.{name}", raising=False)
        monkeypatch.setattr(bssn_fast, name, None, raising=False)  # importing sets it
    monkeypatch.setattr(bssn_fast, "__path__", [str(tmp_path)])
    for name in ("_C", "_build_info"):
        with pytest.raises(ImportError, match="another copy"):
            extension._import(name)


def test_report_in_a_checkout_beside_an_installation(tmp_path):
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    built = shutil.ignore_patterns("*.so", "*.pyd", "_build_info.py", "__pycache__")
    shutil.copytree(ROOT / "bssn_fast", checkout / "bssn_fast", ignore=built)
    install(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop("BSSN_FAST_BACKEND", None)
    command = [sys.executable, "-m", "bssn_fast"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[1] == f"imported from {checkout / 'bssn_fast'}, which hides the one in {site / 'bssn_fast'}"
    assert [line for line in lines if line.startswith("cpu   cpu        not available: the source folder")]
    assert "cpu   reference  available, the default" in lines
    assert "RuntimeWarning" not in done.stderr
