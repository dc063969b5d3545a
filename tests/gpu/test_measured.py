"""What the benchmarks time: the layers of published models, as big as they are, in float32 and bfloat16.

These come first among Triton's tests: what they compile is then on the disk when the same is timed.
"""

import pytest
import torch

from benchmarks.against import peers
from benchmarks.timing.gpu_plan import DTYPES, SETS, VARIANTS
from benchmarks.work import layer_sets, problem


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_right(backend, name, variant, dtype, monkeypatch):
    """Ours sum in float32: of bfloat16 only the rounding of results may differ, where it was a matter of a hair."""
    monkeypatch.setitem(problem.TOLERANCES, torch.bfloat16, 1e-3)
    given = problem.Problem(layer_sets.load()[name], variant, "cuda", getattr(torch, dtype))
    peer = peers.make(f"bssn_fast {backend}", given)
    peer.first_run()
    peer.check(backend)
