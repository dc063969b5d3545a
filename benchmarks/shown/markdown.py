"""Markdown: tables, numbers with three digits, and parts of a page that are written anew."""

from __future__ import annotations

import re
from pathlib import Path

from tabulate import tabulate


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return tabulate(rows, headings, tablefmt="github", disable_numparse=True, stralign=None)


def ms(value: float) -> str:
    """Return three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def replace(page: Path, what: str, text: str) -> None:
    """Replace what stands between a page's markers; raises ValueError if it does not have them once."""
    begin, end = f"<!-- begin {what} -->", f"<!-- end {what} -->"
    pattern = re.compile(re.escape(begin) + ".*" + re.escape(end), re.S)
    changed, count = pattern.subn(lambda _: f"{begin}\n{text}\n{end}", page.read_text())
    if count != 1:
        raise ValueError(f"{page} must have the lines {begin!r} and {end!r} once")
    page.write_text(changed)
