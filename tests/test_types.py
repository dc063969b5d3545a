"""What mypy and pyright say of calls: a wrong word is an error before anything runs."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import bssn_fast
from bssn_fast import backends
from bssn_fast.modules.parametrization import VARIANTS

ROOT = Path(__file__).parents[1]
CALLS = """
import torch
from torch import nn
import bssn_fast

class Net(nn.Module):
    pass

def settings(variant: bssn_fast.Variant, update: bssn_fast.Update, backend: bssn_fast.Backend) -> None:
    reveal_type(bssn_fast.apply(Net(), variant, update=update, backend=backend))
    reveal_type(bssn_fast.spectral_norm(nn.Linear(2, 2)))
    reveal_type(bssn_fast.sigma(Net()))
    bssn_fast.normalize([], [], backend=backend)

bssn_fast.apply(Net(), "bsnn")  # wrong
bssn_fast.apply(Net(), update="acess")  # wrong
bssn_fast.apply(Net(), backend="gpu")  # wrong
bssn_fast.apply(Net(), "sn", 1.2)  # wrong
bssn_fast.apply(Net().state_dict())  # wrong
bssn_fast.normalize([], [], backend="gpu")  # wrong
"""
REVEALED = ["Net", "Linear", "dict[str, Tensor]"]


def mypy(file: Path) -> list[tuple[int, str, str]]:
    command = [sys.executable, "-m", "mypy", "--output=json", str(file)]  # with what `make lint` has cached of torch
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = map(json.loads, done.stdout.splitlines())
    return [(m["line"], m["severity"], m["message"]) for m in found if m["file"].endswith(file.name)]


def basedpyright(file: Path) -> list[tuple[int, str, str]]:
    """What pyright says: this is the same checker, with the JavaScript engine that pyright would fetch when it runs."""
    command = [sys.executable, "-m", "basedpyright", "--outputjson", f"--pythonpath={sys.executable}", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    return [(m["range"]["start"]["line"] + 1, m["severity"], m["message"]) for m in found]


@pytest.mark.parametrize("checker", [mypy, basedpyright])
def test_a_wrong_word_is_an_error(checker, tmp_path: Path) -> None:
    pytest.importorskip(checker.__name__)
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    found = checker(file)
    wrong = [number for number, line in enumerate(CALLS.splitlines(), 1) if line.endswith("# wrong")]
    assert sorted({line for line, severity, _ in found if severity == "error"}) == wrong, found
    shown = [re.findall('"(.*?)"', text)[-1] for _, severity, text in found if severity in ("note", "information")]
    assert [re.sub(r"\b[\w.]+\.(?=\w)", "", kind) for kind in shown] == REVEALED


def test_the_words_are_those_that_are_known() -> None:
    assert get_args(bssn_fast.Variant) == tuple(VARIANTS)
    assert get_args(bssn_fast.Backend) == ("", *backends.NAMES)
