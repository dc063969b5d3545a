"""BSSN_FAST_TRITON_PLAN=registers beside other work. Other tests have it as one of the ways."""

import pytest
import torch
from test_streams import Call, assert_equal
from ways import WAYS


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """What programs were made: whether each keeps rows in registers."""
    if ("triton", "single") not in WAYS:
        pytest.skip("needs Triton")
    from bssn_fast.backends.triton import launch, prepared

    monkeypatch.setenv("BSSN_FAST_TRITON_LAUNCH", "single")
    made = []
    build = launch.build
    monkeypatch.setattr(launch, "build", lambda *a, **k: made.append(build(*a, **k)) or made[-1])
    monkeypatch.setattr(launch, "_cache", prepared.Cache())
    return lambda: [program.kept for program in made]


def test_the_same_bits_beside_a_kernel_that_holds_multiprocessors(monkeypatch, kept):
    """Then few programs run at a time, and some of them drop what they have; also in a graph that is replayed."""
    monkeypatch.setenv("BSSN_FAST_TRITON_PLAN", "registers")
    alone, beside, captured = (Call("triton", repeat=4) for _ in range(3))
    alone.both()
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    large = torch.randn(8192, 8192, device="cuda")
    with torch.cuda.stream(other):
        for _ in range(20):
            large @ large
    beside.both()
    torch.cuda.synchronize()
    assert_equal(alone, beside)
    graph = torch.cuda.CUDAGraph()
    vectors = [v.clone() for v in captured.x.vectors]
    captured.both()
    with torch.cuda.graph(graph):
        captured.both()
    for _ in range(3):
        captured.poison()
        for v, before in zip(captured.x.vectors, vectors, strict=True):
            v.copy_(before)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(alone, captured)
    assert any(kept())
