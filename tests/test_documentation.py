"""What `make docs`, which builds the site with all links checked, cannot see."""

import re
from pathlib import Path

import pytest

import bssn_fast

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_reference_has_every_public_name():
    listed = re.findall(r"^::: bssn_fast\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(bssn_fast.__all__)
    for name in bssn_fast.__all__:
        assert getattr(bssn_fast, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target
