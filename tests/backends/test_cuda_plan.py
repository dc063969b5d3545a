"""How calls of the CUDA kernels are cut into tiles, which no kernel has to run for."""

from math import prod

import cuda_emulated
import matrix
import pytest
import torch
from cuda_emulated import H200
from cuda_planned import (
    DOT,
    DOT_REST,
    POWER,
    REDUCE,
    SETS,
    SUBTRACT,
    WRITE,
    backward_plan,
    order,
    plans,
    shapes_of,
    table,
    workspace,
)

if cuda_emulated.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)


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


GENERAL, ROWS_1, ROWS_9, ROWS_16, ROWS_9_KERNEL_MAJOR, ROWS_9_LONG, SHORT = range(7)


@pytest.mark.parametrize(
    ("shape", "memory", "taken"),
    [
        ((128, 128, 3, 3), "contiguous", ROWS_9),
        ((1024, 1024, 3, 3), "contiguous", ROWS_9),
        ((128, 128, 3, 3), "channels_last", ROWS_9_KERNEL_MAJOR),
        ((1536, 1536, 3, 3), "contiguous", ROWS_9_LONG),
        ((256, 256, 4, 4), "contiguous", ROWS_16),
        ((256, 256, 1, 1), "channels_last", ROWS_1),
        ((1, 8192), "contiguous", ROWS_1),
        ((64, 3, 3, 3), "contiguous", SHORT),
        ((64, 3, 4, 4), "channels_last", SHORT),
        ((512, 1, 3, 3), "contiguous", SHORT),
        ((64, 3, 5, 5), "contiguous", SHORT),  # 75 elements: an odd number, so no two in the same bank
        ((256, 64, 5, 5), "contiguous", GENERAL),
        ((256, 63, 3, 3), "contiguous", GENERAL),
        ((16, 20000), "contiguous", GENERAL),
    ],
)
def test_how_rows_are_taken(shape, memory, taken):
    weight = matrix.place(torch.empty(shape, device="meta"), memory)
    (plan,) = plans(table((shape,), (weight.stride(),)), 1)
    assert plan.rows == taken


@pytest.mark.parametrize("name", ["sngan_d32", "bsn_cnn_d32"])
def test_small_models_are_one_wave_of_tiles(name):
    """Each multiprocessor has one, or a second one would come behind all others."""
    shapes = shapes_of(name)
    assert 90 <= sum(plan.power_tiles for plan in plans(table(shapes), len(shapes))) <= H200.multiprocessors


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


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (1024, 1000, 3, 3), (256, 128, 1, 1), (512, 256, 4, 4), (8192, 128)])
def test_usual_gradients_are_written_by_rows(shape, dim, memory):
    """By most of a block's threads, in tiles that cover all of it and nothing twice."""
    weight = torch.empty(shape, device="meta")
    ((plan,), _) = backward_plan(table((shape,), (matrix.place(weight, memory).stride(),), dim), 1)
    rows, pieces = shape[0], prod(shape[1:]) // 4
    assert plan.column_blocks > 0
    assert (plan.column_blocks - 1) * plan.width < pieces <= plan.column_blocks * plan.width
    assert plan.write_tiles == plan.column_blocks * -(-rows // plan.tile_rows)
    assert plan.tile_rows % plan.rows_at_once == 0
    assert 0.6 * 256 < plan.width * plan.rows_at_once <= 256


@pytest.mark.parametrize(
    ("shape", "memory"),
    [
        ((64, 3, 3, 3), "contiguous"),  # rows that are no multiple of four
        ((1, 8192), "contiguous"),  # few rows
        ((64, 64, 9), "reversed"),  # kernel positions outermost
    ],
)
def test_other_gradients_are_not_written_by_rows(shape, memory):
    weight = torch.empty(shape, device="meta")
    ((plan,), _) = backward_plan(table((shape,), (matrix.place(weight, memory).stride(),)), 1)
    assert plan.column_blocks == 0


@pytest.mark.parametrize("name", SETS)
def test_gradients_are_written_soon_and_not_too_soon(name):
    """Behind all their <G, W>, with about as many tiles in between as there are blocks: G can be cached still."""
    shapes = sorted(shapes_of(name), key=prod, reverse=True)
    planned, segments = backward_plan(table(shapes), len(shapes))
    blocks, ticket = 3 * H200.multiprocessors, 0
    for segment in segments:
        assert segment.first == ticket
        ticket += segment.tiles
    for layer, plan in enumerate(planned):
        at = [j for j, segment in enumerate(segments) if segment.layer == layer]
        kinds = [segments[j].kind for j in at]
        assert kinds in ([DOT, SUBTRACT], [DOT, DOT_REST, SUBTRACT])
        assert sum(segments[j].tiles for j in at[:-1]) == plan.dot_tiles
        assert segments[at[-1]].tiles == plan.write_tiles
        between = [segment for segment in segments[at[-2] + 1 : at[-1]] if segment.kind != SUBTRACT]
        assert sum(segment.tiles for segment in between) <= 2 * blocks
        if any(segment.kind != SUBTRACT for segment in segments[at[-1] :]):
            assert segments[at[-1]].first - segments[at[-2]].first - segments[at[-2]].tiles >= 0.6 * blocks
