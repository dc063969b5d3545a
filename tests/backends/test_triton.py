"""Triton has two ways to run without a GPU, and decides between them when it is imported: a process for each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("file", "interpret"), [("triton_interpreted.py", "1"), ("triton_refused.py", "1"), ("triton_compiled.py", "0")]
)
def test_without_gpu(file, interpret):
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    environment.pop("BSSN_FAST_TRITON_LAUNCH", None)
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
