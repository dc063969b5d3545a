"""The order in which a call's tiles are numbered. A tile waits only for smaller numbers, of its own layer.

A program takes the next number and only then begins to wait, so that what it waits for has been taken by programs that
run: the smallest unfinished tile never waits, however many programs run at a time.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Tiles(NamedTuple):
    """Tiles of one kind. work: how long one takes, in elements that a program reads and writes meanwhile."""

    kind: int
    n: int
    work: int


Stage = list[Tiles]
"""Tiles of a layer that may run together."""

OVERHEAD = 6000
"""Elements that a program could have moved while it takes a tile and waits for its first elements: 1.5 µs on an H200,
of whose bandwidth each of 264 programs has 16 GB/s."""

HANDOVER = 4000
"""The same for the time until others know that a stage's last tile is finished: 1 µs."""


def count(stage: Stage) -> int:
    return sum(tiles.n for tiles in stage)


def by_stage(layers: Sequence[Sequence[Stage]]) -> list[tuple[int, int]]:
    """Return (stage, layer): all layers' first stages, then all second ones, and so on, for one launch per stage."""
    return [(stage, layer) for stage in range(len(layers[0])) for layer in range(len(layers))]


def layer_by_layer(layers: Sequence[Sequence[Stage]], programs: int) -> list[tuple[int, int]]:
    """Return (stage, layer) in the order for a single launch, of which `programs` run at a time.

    Whenever a program becomes free, a layer's next stage begins if by then its tiles will not have to wait, the latest
    stage first, then the largest layer; else another layer begins. When that will be is found by letting the programs
    run, with OVERHEAD, HANDOVER and each tile's work. Nothing depends on whether it is right but the time.
    """
    result: list[tuple[int, int]] = []
    free = [0] * programs  # when each program is
    ready: list[tuple[int, int, int]] = []  # (when, stage, layer): stages that follow what is in `result`
    begun = 0
    while ready or begun < len(layers):
        now = free[0] if begun < len(layers) else max(free[0], min(ready)[0])
        able = [entry for entry in ready if entry[0] <= now]
        if able:
            chosen = min(able, key=lambda entry: (-entry[1], entry[2]))
            ready.remove(chosen)
        else:
            chosen = (0, 0, begun)
            begun += 1
        start, stage, layer = chosen
        finished = 0
        for tiles in layers[layer][stage]:
            for _ in range(tiles.n):
                end = max(free[0], start) + OVERHEAD + tiles.work
                heapq.heapreplace(free, end)
                finished = max(finished, end)
        result.append((stage, layer))
        if stage + 1 < len(layers[layer]):
            ready.append((finished + HANDOVER, stage + 1, layer))
    return result
