"""The compiled module, if it was built. Importing this always succeeds."""

from __future__ import annotations

import importlib
from typing import Any

module: Any
_problem: str | None

try:
    module = importlib.import_module("bssn_fast._C")
    _problem = None
except ImportError as error:
    module = None
    _problem = str(error)

not_built: dict[str, str]
"""Why setup.py left out a backend, by the backend's name; empty where the package was never built."""

try:
    not_built = importlib.import_module("bssn_fast._build_info").NOT_BUILT
except ImportError:
    not_built = {}


def why_missing() -> str | None:
    """Return None if the extension is there, else why not and what to do."""
    if module is not None:
        return None
    if "cpu" in not_built:
        return f"the C++ extension was not built: {not_built['cpu']}"
    return (
        f"the C++ extension is missing ({_problem}); reinstall with `pip install --force-reinstall --no-deps .`, "
        "which needs a C++ compiler"
    )
