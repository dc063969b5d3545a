"""Files that an interrupted run can rely on."""

from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write a file so that an interrupted write leaves none."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(file)
