"""How calls of the CUDA kernels are cut into tiles, which no kernel has to run for."""

import ctypes
import json
from math import prod
from pathlib import Path
from typing import NamedTuple

import cuda_emulated
import matrix
import pytest
import torch
from cuda_emulated import H200

from bssn_fast.backends import cuda
from bssn_fast.layout import Batch, needs_two_sides

if cuda_emulated.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

POWER, REDUCE, WRITE = range(3)
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


def table(shapes, strides=None, dim=0, both=None):
    strides = strides or tuple(torch.empty(shape, device="meta").stride() for shape in shapes)
    two_sided = tuple(needs_two_sides(shape) if both is None else both for shape in shapes)
    return cuda._Table(Batch(tuple(shapes), tuple(strides), (dim,) * len(shapes), two_sided), range(len(shapes)))


def plans(layers, n, dtype=torch.float32) -> list[Plan]:
    width = len(Plan._fields)
    out = (ctypes.c_int64 * (width * n))()
    cuda_emulated.library().plan_of(layers.address, n, cuda._DTYPES[dtype], *H200.limits, ctypes.addressof(out))
    return [Plan(*out[width * j : width * (j + 1)]) for j in range(n)]


def workspace(layers, n) -> int:
    return cuda_emulated.library().forward_workspace(layers.address, n, 0, *H200.limits)


@pytest.mark.parametrize(
    ("shape", "dim", "dtype", "staged"),
    [
        ((1536, 1536, 3, 3), 0, torch.float32, True),  # BigGAN's largest
        ((1024, 1024, 3, 3), 0, torch.float32, True),
        ((512, 512, 4, 4), 0, torch.float32, True),
        ((64, 3, 3, 3), 0, torch.bfloat16, True),
        ((512, 256, 4, 4), 1, torch.float32, True),  # of a transposed convolution
        ((100, 512, 4, 4), 1, torch.bfloat16, True),
        ((4, 100000), 0, torch.float32, False),
    ],
)
def test_which_rows_are_staged(shape, dim, dtype, staged):
    """In the order of memory that layers have by default and in channels_last."""
    weight = torch.empty(shape, device="meta")
    for strides in (weight.stride(), matrix.place(weight, "channels_last").stride()):
        (plan,) = plans(table((shape,), (strides,), dim, weight.ndim > 2), 1, dtype)
        assert (plan.stage_bytes > 0) == staged
        assert not staged or plan.stages >= 2 or plan.power_tiles * plan.channels == shape[dim], (
            "nothing is copied ahead"
        )


@pytest.mark.parametrize(
    ("shape", "tiles", "megabytes"),
    [((1, 262144), 32, 1), ((4, 50_000_000), 132, 1), ((2, 4_600_000, 2), 132, 1), ((1000, 20_000), 132, 1)],
)
def test_long_rows_are_split(shape, tiles, megabytes):
    """Over many multiprocessors, with a workspace that does not grow with the rows."""
    layers = table((shape,))
    (plan,) = plans(layers, 1)
    assert plan.power_tiles >= tiles
    assert plan.reduce_tiles - plan.first_tiles >= tiles
    assert workspace(layers, 1) < megabytes << 20


def test_one_direction_needs_no_room_for_the_other():
    shape = (1024, 4096)
    one, two = (workspace(table((shape,), both=both), 1) for both in (False, True))
    (plan,) = plans(table((shape,), both=False), 1)
    assert plan.power_tiles * shape[1] * 4 < one < 1.1 * plan.power_tiles * shape[1] * 4
    assert two > 1.8 * one


@pytest.mark.parametrize("shape", [(2**29, 1, 3), (1, 2**29, 3), (2**30, 1, 1), (1, 2**30, 1), (2**31 - 1, 1)])
def test_counts_that_exceed_31_bits(shape):
    """Of a weight of less than 2^31 elements in two directions."""
    layers = table((shape,), both=True)
    (plan,) = plans(layers, 1)
    c_out, kernel = shape[0], prod(shape[2:])
    assert plan.firsts == c_out * (1 + kernel)
    assert 0 < plan.reduce_tiles - plan.first_tiles < 2**31
    assert 0 < plan.power_tiles < 2**31
    assert 0 < workspace(layers, 1) < 20 * prod(shape)


def order(shapes):
    """(layer, phase, first ticket) of each segment, the largest layer being the first, and the number of tickets."""
    shapes = sorted(shapes, key=prod, reverse=True)
    numbers = (ctypes.c_int64 * (9 * len(shapes) + 1))()
    layers = table(shapes)
    cuda_emulated.library().order_of(layers.address, len(shapes), 0, *H200.limits, ctypes.addressof(numbers))
    return [tuple(numbers[j : j + 3]) for j in range(0, 9 * len(shapes), 3)], numbers[9 * len(shapes)]


def shapes_of(name):
    return [tuple(shape) for _, shape, _ in SETS[name]["layers"]]


@pytest.mark.parametrize("name", SETS)
def test_segments_come_in_the_order_of_a_layers_phases(name):
    """Or a launch could hang."""
    shapes = shapes_of(name)
    segments, tickets = order(shapes)
    for layer in range(len(shapes)):
        assert [phase for at, phase, _ in segments if at == layer] == [POWER, REDUCE, WRITE]
    firsts = [first for _, _, first in segments]
    assert firsts[0] == 0
    assert firsts == sorted(set(firsts))
    assert firsts[-1] < tickets


def test_later_phases_begin_as_soon_as_nothing_waits_for_them():
    """Large models': before the last power tiles. Small models' power tiles are all at work at the same time."""
    phases = [phase for _, phase, _ in order([(512, 512, 3, 3)] * 40)[0]]
    assert phases.index(REDUCE) < len(phases) - 1 - phases[::-1].index(POWER)
    phases = [phase for _, phase, _ in order(shapes_of("sngan_d32"))[0]]
    assert set(phases[: len(phases) // 3]) == {POWER}
