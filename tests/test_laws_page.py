"""The examples of docs/laws.md run as they are printed."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "laws.md").read_text()
EXAMPLES = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).*\n)*?```python\n((?:(?!```).*\n)*)```", PAGE, flags=re.MULTILINE)


def test_each_group_of_users_has_one():
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example(title, code):
    exec(compile(code, f"docs/laws.md: {title}", "exec"), {"__name__": "example"})
