"""A small program for compute-sanitizer: the backends that are its arguments, forward and backward, checked."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "backends")]

import matrix  # noqa: E402 - after the path is set
import torch  # noqa: E402
from matrix import Case  # noqa: E402

from benchmarks.against.peers import PLANS, variable_of  # noqa: E402
from bssn_fast import backends  # noqa: E402

CASES = [
    Case(shapes=((16, 3, 3, 3), (40, 16, 3, 3), (1, 200), (33, 17)), dims=(0, 0, 0, 0)),
    Case(shapes=((8, 12, 4, 4), (7, 5, 3, 3)), dims=(1, 0), memory="channels_last", offset=1),
]

for name in sys.argv[1:]:
    if backends.why_unavailable(name, "cuda") is None:
        for mode in ("single", "phases", *PLANS.get(name, ())):
            variable, value = variable_of(name, mode)
            os.environ[variable] = value
            for case in CASES:
                matrix.check(name, case, "cuda")
            torch.cuda.synchronize()
            del os.environ[variable]
            print(f"{name} {mode}: right", flush=True)
