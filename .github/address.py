"""Gives an archive the repository's address, before it is built: python .github/address.py ADDRESS TAG.

Adds [project.urls] to pyproject.toml, and makes the README's links and pictures absolute: package indexes show the
README without the files beside it.
"""

import re
import sys
from pathlib import Path


def main(address: str, tag: str) -> None:
    """Change README.md and pyproject.toml in the current folder."""
    readme, project = Path("README.md"), Path("pyproject.toml")
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\1{address}/raw/{tag}/", readme.read_text())
    readme.write_text(re.sub(r"(\]\()(?!https?:|#)", rf"\1{address}/blob/{tag}/", text))
    urls = f'[project.urls]\nRepository = "{address}"\nIssues = "{address}/issues"\n'
    urls += f'Changelog = "{address}/blob/{tag}/CHANGELOG.md"\nDocumentation = "{address}/tree/{tag}/docs"\n\n'
    head, tail = project.read_text().split("[project.optional-dependencies]")
    project.write_text(f"{head}{urls}[project.optional-dependencies]{tail}")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), sys.argv[2])
