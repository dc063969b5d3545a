"""The order of tiles and the cut of layers into tiles, which no kernel has to run for."""

import pytest

pytest.importorskip("triton")

import torch

from bssn_fast.backends.triton import fields, program
from bssn_fast.backends.triton.geometry import Geometry, geometry
from bssn_fast.backends.triton.order import count
from bssn_fast.layout import needs_two_sides

SHAPES = [(64, 3, 3, 3), *[(512, 512, 3, 3), (512, 256, 1, 1)] * 6, (1, 8192), (1024, 1024, 3, 3), (1, 1), (3, 5)]


def place(shape, dim=0, memory="contiguous", aligned=True, itemsize=4) -> Geometry | None:
    x = torch.empty(shape, device="meta")
    strides = x.to(memory_format=torch.channels_last).stride() if memory == "channels_last" else x.stride()
    return geometry(shape, strides, dim, needs_two_sides(shape), itemsize, aligned)


def programs(single):
    layers = [
        program.Layer(n, place(shape), 0, 0, (0,) * 4, (0,) * 4, (0, 1.0, 0, 0)) for n, shape in enumerate(SHAPES)
    ]
    for backward in (False, True):
        if backward:
            stages = [program.backward_stages(layer.geometry) for layer in layers]
        else:
            stages = [program.stages(layer.geometry, iterate=True, write=True) for layer in layers]
        yield stages, program.build(layers, stages, single=single, backward=backward, programs=40)


def segments(built):
    width = fields.SEGMENT_FIELDS.value
    rows = [built.values[n * width : (n + 1) * width] for n in range(built.n_segments)]
    return [row for row in rows if row[0] < 2**31]


@pytest.mark.parametrize("single", [True, False])
def test_tiles_wait_only_for_smaller_numbers(single):
    """Or a launch could hang: only programs with smaller numbers are sure to have started."""
    for stages, built in programs(single):
        rows = segments(built)
        layers = built.values[built.n_segments * fields.SEGMENT_FIELDS.value :]
        counters = layers[fields.DONE_COUNTER.value :: fields.LAYER_FIELDS.value]
        stage_of = {fields.ROWS.value: 0, fields.COLUMNS.value: 1, fields.INNER.value: 0}  # of tiles that are awaited
        ends = [row[0] for row in rows[1:]] + [sum(n for _, n in built.launches)]
        finished = {}
        for (start, kind, layer, awaited, n), end in zip(rows, ends, strict=True):
            assert end > start
            if n:
                assert finished[awaited] == n
            if kind in stage_of:
                done = counters[layer] + stage_of[kind]
                finished[done] = finished.get(done, 0) + end - start
        assert ends[-1] == sum(count(stage) for layer in stages for stage in layer)
        assert max(finished) < built.counters_size


def test_a_launch_per_phase_is_in_order():
    for stages, built in programs(single=False):
        assert len(built.launches) == len(stages[0])
        position = 0
        for ((first,), n), stage in zip(built.launches, range(len(stages[0])), strict=True):
            assert first == position
            assert n == sum(count(layer[stage]) for layer in stages)
            position += n


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_cover_a_layer_once(shape):
    g = place(shape)
    assert (g.row_tiles - 1) * g.rows_per_tile < g.c_out <= g.row_tiles * g.rows_per_tile
    assert g.shape.flat
    assert (g.steps - 1) * g.step < g.row_size <= g.steps * g.step
    assert g.step <= g.shape.groups
    assert g.step % g.k == g.step % g.shape.vector == g.row_size % g.shape.vector == 0


def test_vectors_need_alignment_and_whole_rows():
    assert place((64, 64, 3, 3)).shape.vector == 4
    assert place((64, 64, 3, 3), aligned=False).shape.vector == 1
    assert place((64, 6, 3, 3)).shape.vector == 1
    assert place((64, 3, 4, 4)).shape.vector == 4
    assert place((64, 4, 23, 23)).shape.vector == 1  # no step of whole channels and vectors fits into a tile
    assert place((64, 3, 3, 3)).shape.vector == 1
    assert place((64, 64, 3, 3), memory="channels_last").shape.vector == 4
    assert place((64, 64, 1, 1), itemsize=2).shape.vector == 8
    assert place((64, 64, 4, 4), dim=1).shape.vector == 1


@pytest.mark.parametrize(
    ("shape", "tile", "steps"),
    [
        ((512, 512, 3, 3), (4, 1024), 5),  # steps of 1008
        ((1536, 1536, 3, 3), (2, 2048), 7),  # two rows stay in the second-level cache
        ((64, 3, 3, 3), (64, 32), 1),
        ((100, 16, 3, 3), (16, 256), 1),
        ((1, 8192), (1, 4096), 2),  # one tile, which all wait for
        ((1, 512, 4, 4), (2, 2048), 4),
        ((3, 4, 2048), (2, 2048), 4),
    ],
)
def test_tiles_of_flat_rows(shape, tile, steps):
    g = place(shape)
    assert (g.shape.rows, g.shape.groups) == tile
    assert g.steps == steps


def test_one_run_of_memory_is_one_kernel_position():
    flat = geometry((8, 5, 3, 3), (45, 9, 3, 1), 0, False, 4, True)
    assert (flat.c_in, flat.k) == (45, 1)
    assert geometry((5, 8, 3, 3), (72, 9, 3, 1), 1, False, 4, True).k == 9  # a transposed convolution's is not


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2, 3, 3, 3), (27, 9, 1, 3)), ((2, 0, 3, 3), (0, 9, 3, 1)), ((2, 2, 2100), (4200, 2100, 1))],
    ids=["kernel dimensions swapped", "empty", "long kernel"],
)
def test_what_the_kernels_cannot_address(shape, strides):
    assert geometry(shape, strides, 0, True, 4, True) is None


def test_encoded_numbers_look_alike_to_triton():
    for number in (0, 1, 16, 2**31, 2**57):
        encoded = fields.encode(number)
        assert 2**31 < encoded < 2**63
        assert encoded % 2 == 1
        assert (encoded - fields.BIAS.value) >> 1 == number
