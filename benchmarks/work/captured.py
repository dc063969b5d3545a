"""Calls captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

WARM_UP = 3


def capture(
    stages: Sequence[Callable[[], None]], release: Callable[[], None] = lambda: None
) -> list[torch.cuda.CUDAGraph]:
    """Run the stages a few times, then capture each in a graph of its own, all with one pool of memory.

    `release` lets go of what a run has made; what the captured run has made is kept, as replays write there.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is allocated or compiled in first calls cannot be captured
        for _ in range(WARM_UP):
            for stage in stages:
                stage()
            release()
    torch.cuda.current_stream().wait_stream(side)
    graphs: list[torch.cuda.CUDAGraph] = []
    for stage in stages:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            stage()
        graphs.append(graph)
    return graphs
