"""Triton has two ways to run without a GPU, and decides between them when it is imported: a process for each."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton", minversion="3.4")

HERE = Path(__file__).parent


def _version(module):
    return tuple(map(int, module.__version__.split(".")[:2]))


@pytest.mark.parametrize(
    ("file", "interpret"),
    [
        ("triton_interpreted.py", "1"),
        ("triton_refused.py", "1"),
        ("triton_buffers.py", "1"),
        ("triton_registers.py", "1"),
        ("triton_compiled.py", "0"),
    ],
)
def test_without_gpu(file, interpret):
    if interpret == "1" and _version(triton) < (3, 7) and _version(np) >= (2, 4):
        pytest.skip("Interpreters before Triton 3.7's need NumPy before 2.4, which refuses what earlier ones warned of")
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    environment.pop("BSSN_FAST_TRITON_LAUNCH", None)
    environment.pop("BSSN_FAST_TRITON_PLAN", None)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
