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


def why_missing() -> str | None:
    """Return None if the extension is there, else why not and what to do."""
    if module is not None:
        return None
    return (
        f"the C++ extension is missing ({_problem}); install a C++ compiler and reinstall with "
        "`pip install --force-reinstall --no-deps .`"
    )
