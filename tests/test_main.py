import os
import re
import subprocess
import sys

from bssn_fast import __main__, backends


def test_report_names_every_backend(capsys):
    text = __main__.report()
    assert re.match(r"bssn_fast \d+\.\d+", text)
    for name in backends.NAMES:
        assert re.search(rf"^(cpu|cuda) +{name} +(available|not available: \S+)", text, re.MULTILINE), name
    cpu = re.search(r"^cpu +cpu +(.*)$", text, re.MULTILINE).group(1)
    assert cpu.startswith("available") == (backends.why_unavailable("cpu", "cpu") is None)


def test_command():
    run = subprocess.run([sys.executable, "-m", "bssn_fast"], capture_output=True, text=True, check=True)
    found, expected = (re.sub(r"\d+ threads", "", text.strip()) for text in (run.stdout, __main__.report()))
    assert found == expected


def test_environment_chooses_the_default():
    environment = {**os.environ, "BSSN_FAST_BACKEND": "reference"}
    run = subprocess.run(
        [sys.executable, "-m", "bssn_fast"], env=environment, capture_output=True, text=True, check=True
    )
    assert re.search(r"^cpu +reference +available, the default", run.stdout, re.MULTILINE)
