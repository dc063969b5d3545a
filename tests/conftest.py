"""Makes the tests' helper modules importable and pins what would make results depend on the machine."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "backends")]

FUZZ = float(os.environ.get("BSSN_FAST_FUZZ", "1"))
"""How many times longer than usual the tests with random inputs run. The inputs of a number are always the same."""

hypothesis.settings.register_profile(
    "bssn_fast", deadline=None, derandomize=True, max_examples=max(1, round(40 * FUZZ))
)
hypothesis.settings.load_profile("bssn_fast")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are small; tests of threads set their own number


@pytest.fixture
def launches(monkeypatch):
    """What the default CPU backend is asked for: a growing list of (number of layers, power iterations)."""
    from bssn_fast import backends

    backend = backends.get("", torch.device("cpu"))
    forward = backend.forward
    seen: list[tuple[int, int]] = []

    def counting(batch, weights, vectors, laws, eps, n_power_iterations, *outputs):
        seen.append((len(weights), n_power_iterations))
        forward(batch, weights, vectors, laws, eps, n_power_iterations, *outputs)

    monkeypatch.setattr(backend, "forward", counting)
    return seen
