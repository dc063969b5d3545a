"""`python -m bssn_fast`: which backends work on this machine, and why the others do not."""

from __future__ import annotations

import platform
import warnings

import torch

import bssn_fast
from bssn_fast import backends
from bssn_fast.backends import extension


def report() -> str:
    """Return the versions, and a line for each backend and type of device it can serve."""
    lines = [f"bssn_fast {bssn_fast.__version__}, torch {torch.__version__}, Python {platform.python_version()}"]
    if torch.cuda.is_available():
        lines[0] += f", {torch.cuda.get_device_name()}"
    hidden = extension.hidden_installation()
    lines.append(f"imported from {extension.FOLDER}" + (f", which hides the one in {hidden}" if hidden else ""))
    for device_type in ("cpu", "cuda"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is the reference: the lines below say so, with the reasons
            default = backends.default(device_type)
        for name in backends.NAMES:
            if not backends.serves(name, device_type):
                continue
            reason = backends.why_unavailable(name, device_type)
            note = f"not available: {reason}" if reason else "available"
            if name == default and not reason:
                note += ", the default"
            if name == "cpu" and not reason:
                note += f" ({extension.module.cpu_instruction_set()}, {torch.get_num_threads()} threads)"
            lines.append(f"{device_type:5} {name:10} {note}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
