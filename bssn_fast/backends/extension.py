"""The compiled module, if it was built. Importing this always succeeds."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1]
"""Where this package was imported from."""


def _import(name: str) -> Any:
    """Import a module that the build puts into this folder.

    With an editable installation of another checkout Python finds that one's, which may be made from other sources.
    """
    found = importlib.import_module(f"bssn_fast.{name}")
    if not Path(str(found.__file__)).parent.samefile(FOLDER):
        raise ImportError(f"there is only that of another copy of the package, {found.__file__}")
    return found


module: Any
_problem: str | None

try:
    module = _import("_C")
    _problem = None
except ImportError as error:
    module = None
    _problem = str(error)

not_built: dict[str, str]
"""Why setup.py left out a backend, by the backend's name; empty where the package was never built."""

try:
    not_built = _import("_build_info").NOT_BUILT
except ImportError:
    not_built = {}


def hidden_installation() -> Path | None:
    """Return the folder of an installed bssn_fast that this one hides, else None.

    It happens in a checkout: Python looks for packages in the current folder first.
    """
    for distribution in metadata.distributions(name="bssn_fast"):
        installed = Path(str(distribution.locate_file("bssn_fast"))).resolve()
        if installed != FOLDER and (installed / "__init__.py").exists():
            return installed
    return None


def why_missing() -> str | None:
    """Return None if the extension is there, else why not and what to do."""
    if module is not None:
        return None
    hidden = hidden_installation()
    if hidden is not None:
        return (
            f"the source folder {FOLDER}, in which the C++ extension was not built, hides the package installed in "
            f"{hidden}; start Python in another folder, or install by `pip install -e .`"
        )
    if "cpu" in not_built:
        return f"the C++ extension was not built: {not_built['cpu']}"
    return (
        f"the C++ extension is missing ({_problem}); reinstall with `pip install --force-reinstall --no-deps .` in the "
        "source folder, which needs a C++ compiler"
    )
