"""The order of Triton's tiles for real models, which no kernel has to run for."""

import pytest

pytest.importorskip("triton")

import torch

from benchmarks.work.layer_sets import load
from bssn_fast.backends.triton import order, program
from bssn_fast.backends.triton.geometry import geometry
from bssn_fast.backends.triton.order import Tiles
from bssn_fast.layout import needs_two_sides

SETS = load()
PROGRAMS = 264  # of an H200


def stages_of(name, backward):
    found = []
    for layer in SETS[name].layers:
        shape, dim = tuple(layer.shape), layer.dim
        strides = torch.empty(shape, device="meta").stride()
        found.append(geometry(shape, strides, dim, needs_two_sides(shape), 4, True))
    found.sort(key=lambda g: -g.numel)  # as calls have them
    return [program.backward_stages(g) if backward else program.stages(g, iterate=True, write=True) for g in found]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_stages_come_once_and_in_their_order(name, backward):
    stages = stages_of(name, backward)
    for found in (order.layer_by_layer(stages, PROGRAMS), order.by_stage(stages)):
        next_stage = [0] * len(stages)
        for stage, layer in found:
            assert stage == next_stage[layer]
            next_stage[layer] += 1
        assert next_stage == [len(own) for own in stages]
        assert [layer for stage, layer in found if stage == 0] == sorted(range(len(stages)))  # the largest ones first


def run(found, stages):
    """Let PROGRAMS take the tiles; return when each stage's last tile has been finished, and what waited for how long.

    The times of tiles are those that the order is made with; while other layers can begin, nothing waits.
    """
    free, finished, waits = [0] * PROGRAMS, {}, []
    begun = 0
    for stage, layer in found:
        begun += stage == 0
        known = finished[stage - 1, layer] + order.HANDOVER if stage else 0
        if known > min(free):
            waits.append((stage, layer, begun))
        for kind, n, work in stages[layer][stage]:
            assert kind >= 0
            for _ in range(n):
                at = min(free)
                free[free.index(at)] = end = max(at, known) + order.OVERHEAD + work
                finished[stage, layer] = max(finished.get((stage, layer), 0), end)
    return max(free), waits


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", [name for name in SETS if name != "biggan_deep_g128"])
def test_no_tile_waits_while_other_layers_can_begin(name, backward):
    stages = stages_of(name, backward)
    _, waits = run(order.layer_by_layer(stages, PROGRAMS), stages)
    assert all(begun == len(stages) for _, _, begun in waits)


@pytest.mark.parametrize(("name", "least"), [("hifigan_msd", 0.1), ("dcgan_g32", 0.1), ("bsn_resnet_d128", -0.05)])
def test_what_the_order_gains_over_stage_by_stage(name, least):
    stages = stages_of(name, backward=False)
    mine, other = (run(found, stages)[0] for found in (order.layer_by_layer(stages, PROGRAMS), order.by_stage(stages)))
    assert mine < (1 - least) * other


def test_a_layer_goes_on_as_soon_as_its_tiles_need_not_wait():
    """Whose ten tiles are all programs' at a time, or those of few programs among many."""
    layers = [[[Tiles(0, 10, 100_000)], [Tiles(1, 10, 100_000)]]] * 3
    assert order.layer_by_layer(layers, 10) == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2)]
    assert order.layer_by_layer(layers, 1000) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
