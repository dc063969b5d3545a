"""The reference of the public names, as `make docs` builds it, and the links between the documents."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import bssn_fast

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_reference_has_every_public_name(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "pdoc", "-d", "google", "-o", str(tmp_path), "bssn_fast"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "bssn_fast.html").read_text()
    for name in bssn_fast.__all__:
        if isinstance(getattr(bssn_fast, name), ModuleType):
            assert (tmp_path / "bssn_fast" / f"{name}.html").exists()
        else:
            assert f'id="{name}"' in page, name
        assert getattr(bssn_fast, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target
