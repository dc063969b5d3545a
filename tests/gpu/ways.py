"""The backends that serve GPUs, each with its ways of launching and its plans."""

import torch

from benchmarks.against.peers import PLANS
from bssn_fast import backends

WAYS = [  # a backend and its way; without a GPU all, to be listed
    (backend, mode)
    for backend in ("triton", "cuda")
    for mode in ("single", "phases", *PLANS.get(backend, ()))
    if not torch.cuda.is_available() or backends.why_unavailable(backend, "cuda") is None
]

SINGLE = [way for way in WAYS if way[1] == "single"]
"""For what does not depend on the launches and takes long."""
