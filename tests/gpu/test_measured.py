"""What the benchmarks time: the layers of published models, as big as they are, and many small ones."""

import pytest
import torch

from benchmarks.against import peers
from benchmarks.timing.gpu_plan import DTYPES, MANY, SETS, VARIANTS
from benchmarks.work import layer_sets, problem

CASES = [(layer_sets.load()[name], dtype) for dtype in DTYPES for name in SETS]
CASES += [(layer_sets.square("linear", n, 4), "float32") for n in MANY]


@pytest.fixture(autouse=True)
def memory_for_others():
    """Large layers' memory is not kept by each of many workers."""
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("layers", "dtype"), CASES, ids=lambda x: x if isinstance(x, str) else x.name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_results_are_right(way, layers, dtype, variant, monkeypatch):
    """Ours sum in float32: of bfloat16 only the rounding of results may differ, where it was a matter of a hair."""
    monkeypatch.setitem(problem.TOLERANCES, torch.bfloat16, 1e-3)
    given = problem.Problem(layers, variant, "cuda", getattr(torch, dtype))
    backend, mode = way
    monkeypatch.delenv(peers.variable_of(*way)[0])  # the peer sets it as it does when it is timed
    peer = peers.make(f"bssn_fast {backend}" + ("" if mode == "single" else f" {mode}"), given)
    peer.first_run()
    peer.check(backend)
