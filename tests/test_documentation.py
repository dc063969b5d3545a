"""What `make docs`, which builds the site with all links checked, cannot see."""

import re
from pathlib import Path
from typing import Literal, get_origin

import pytest

import bssn_fast

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
EXAMPLES = [
    pytest.param(code, id=f"{document.stem}-{j}")
    for document in DOCUMENTS
    for j, code in enumerate(re.findall(r"```python\n(import .*?)```", document.read_text(), flags=re.DOTALL))
]


def test_reference_has_every_public_name():
    listed = re.findall(r"^::: bssn_fast\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(bssn_fast.__all__)
    for name in bssn_fast.__all__:
        found = getattr(bssn_fast, name)
        assert found.__doc__ or get_origin(found) is Literal, f"{name} has no docstring"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_and_lists_begin_after_an_empty_line(document):
    """Tables also after a heading. The site shows others as text."""
    text = document.read_text()
    assert not re.search(r"^[^|#<\n].*\n\|.*\n\|[-:| ]+\|$", text, flags=re.MULTILINE)
    assert not re.search(r"^```\n- ", text, flags=re.MULTILINE)


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if ".plot(" in code:
        pytest.importorskip("matplotlib")
    exec(code, {"__name__": "example"})
