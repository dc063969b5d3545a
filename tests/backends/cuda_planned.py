"""How calls of the CUDA kernels are cut into tiles on an H200."""

from __future__ import annotations

import ctypes
import json
from math import prod
from pathlib import Path
from typing import NamedTuple

import cuda_emulated
import torch
from cuda_emulated import H200

from bssn_fast.backends import cuda
from bssn_fast.layout import Batch, needs_two_sides

POWER, REDUCE, WRITE, WHOLE = range(4)
DOT, DOT_REST, SUBTRACT = range(3)
TILES, PHASES, CLUSTERS, KEEP = range(4)
SETS = json.loads((Path(__file__).parents[2] / "benchmarks" / "work" / "layer_sets.json").read_text())


class Plan(NamedTuple):
    power_tiles: int
    channels: int
    stage_bytes: int
    stages: int
    group_threads: int
    chunks: int
    reduce_tiles: int
    first_tiles: int
    firsts: int
    rows: int
    write_tiles: int
    keeps: int
    lost_stages: int


def table(shapes, strides=None, dim=0, both=None):
    strides = strides or tuple(torch.empty(shape, device="meta").stride() for shape in shapes)
    two_sided = tuple(needs_two_sides(shape) if both is None else both for shape in shapes)
    return cuda._Table(Batch(tuple(shapes), tuple(strides), (dim,) * len(shapes), two_sided), range(len(shapes)))


def plans(layers, n, dtype=torch.float32, way=TILES) -> list[Plan]:
    width = len(Plan._fields)
    out = (ctypes.c_int64 * (width * n))()
    cuda_emulated.library().plan_of(layers.address, n, cuda._DTYPES[dtype], way, *H200.limits, ctypes.addressof(out))
    return [Plan(*out[width * j : width * (j + 1)]) for j in range(n)]


def workspace(layers, n) -> int:
    return cuda_emulated.library().forward_workspace(layers.address, n, 0, TILES, *H200.limits)


def order(shapes, dtype=torch.float32, way=TILES):
    """(layer, phase, first ticket) of each segment, the largest layer being the first, and the number of tickets."""
    shapes = sorted(shapes, key=prod, reverse=True)
    numbers = (ctypes.c_int64 * (9 * len(shapes) + 1))()
    layers = table(shapes)
    kind = cuda._DTYPES[dtype]
    n = cuda_emulated.library().order_of(
        layers.address, len(shapes), kind, way, *H200.limits, ctypes.addressof(numbers)
    )
    return [tuple(numbers[j : j + 3]) for j in range(0, 3 * n, 3)], numbers[3 * n]


class GradientPlan(NamedTuple):
    dot_tiles: int
    write_tiles: int
    column_blocks: int
    width: int
    tile_rows: int
    rows_at_once: int
    kept_steps: int


class Segment(NamedTuple):
    layer: int
    kind: int
    first: int
    tiles: int


def backward_plan(layers, n, dtype=torch.float32, way=TILES) -> tuple[list[GradientPlan], list[Segment]]:
    """The layers' tiles for gradients of a dtype, and the segments of one launch."""
    width = len(GradientPlan._fields)
    numbers = (ctypes.c_int64 * ((width + 9) * n + 1))()
    count = cuda_emulated.library().backward_plan_of(
        layers.address, n, cuda._DTYPES[dtype], way, *H200.limits, ctypes.addressof(numbers)
    )
    begin, end = width * n, width * n + 3 * count
    segments = [tuple(numbers[j : j + 3]) for j in range(begin, end, 3)]
    ends = [first for _, _, first in segments[1:]] + [numbers[end]]
    planned = [GradientPlan(*numbers[j : j + width]) for j in range(0, begin, width)]
    return planned, [Segment(*s, last - s[2]) for s, last in zip(segments, ends, strict=True)]


def shapes_of(name):
    return [tuple(shape) for _, shape, _ in SETS[name]["layers"]]
