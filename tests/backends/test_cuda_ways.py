"""Two more ways for a forward pass to read its weights, BSSN_FAST_CUDA_PLAN: layers in clusters, and rows that stay."""

from math import prod

import cuda_emulated
import matrix
import pytest
import torch
from cuda_emulated import H200, T4, TINY, Gpu, tickets_in_any_order
from cuda_planned import CLUSTERS, KEEP, POWER, REDUCE, SETS, TILES, WHOLE, WRITE, order, plans, shapes_of, table
from matrix import CASES, Case

from bssn_fast import ops
from bssn_fast.laws import Laws
from bssn_fast.layout import Batch

if cuda_emulated.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

DROPPED, PASSED = 1, 2
LAYERS = ((64, 16, 3, 3), (40, 16, 4, 4), (64, 3, 3, 3), (96, 64), (1, 1024), (12, 9, 5, 5), (30, 60, 3, 3))
"""Rows of each kind: one or several warps for each, short ones, a single one, general ones of 4-element and of odd."""


@pytest.fixture(params=["clusters", "keep"])
def plan(request, gpu, monkeypatch):
    monkeypatch.setenv("BSSN_FAST_CUDA_PLAN", request.param)
    return request.param


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_reference(plan, case):
    """A single block, or cluster, which never waits in vain, and several."""
    matrix.check("cuda", case)
    with tickets_in_any_order(hash(str(case)) % 1000 + 1):
        matrix.check("cuda", case)


@pytest.mark.parametrize("limits", [H200, T4, TINY], ids=["h200", "t4", "tiny"])
@pytest.mark.parametrize("memory", matrix.MEMORY)
@pytest.mark.parametrize("offset", [0, 1])
def test_other_gpus_and_unaligned_weights(plan, gpu, limits, memory, offset):
    gpu(limits)
    for seed, dtype in enumerate((torch.float32, torch.bfloat16), 1):
        with tickets_in_any_order(seed):
            matrix.check("cuda", Case(LAYERS, dtype, dtype, memory, offset=offset))


@pytest.mark.parametrize("shape", [(2304, 1, 3, 3), (2056, 3, 1, 1), (3000, 17)])
def test_more_short_rows_than_eight_blocks_have_threads(plan, shape):
    """Of depthwise convolutions, for instance."""
    matrix.check("cuda", Case((shape, (64, 32)), dims=(0, 0)))


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_threads_in_another_order_change_no_bit(plan, iterations):
    case = Case(LAYERS, n_power_iterations=iterations)
    one = matrix.run("cuda", case, matrix.inputs(case))
    with cuda_emulated.last_thread_first():
        other = matrix.run("cuda", case, matrix.inputs(case))
    matrix.assert_same(one, other)


def test_more_layers_than_arguments_hold(plan):
    shapes = tuple((2 + j % 5, 64 + j % 3, 1 + j % 2) for j in range(203))
    before = cuda_emulated.library().count_launches()
    matrix.check("cuda", Case(shapes))
    assert cuda_emulated.library().count_launches() - before == 2  # forward and backward


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_zero_and_non_finite_weights(plan, bad):
    """0 gives 0, all else NaN; no vector changes; other layers of the call are not touched."""
    case = Case(LAYERS, n_power_iterations=2)
    x = matrix.inputs(case)
    untouched = matrix.run("cuda", case, x)
    x.weights[0].fill_(bad)
    found = matrix.run("cuda", case, x)
    assert found.sigma[0] == 0 if bad == 0 else found.sigma[0].isnan()
    assert all(matrix.same_bits(a, b) for a, b in zip(found.vectors[:4], x.vectors[:4], strict=True))
    for a, b in zip(found.normalized[1:], untouched.normalized[1:], strict=True):
        assert matrix.same_bits(a, b)


@pytest.mark.parametrize("in_place", [False, True])
def test_measuring_alone_and_in_place(plan, in_place):
    """Results may be the weights themselves, or there are none at all."""
    case = Case(LAYERS, n_power_iterations=2)
    x = matrix.inputs(case)
    usual = matrix.run("cuda", case, x)
    batch = Batch.of(x.weights, case.dim_list, case.two_sided)
    outputs = [w.clone() for w in x.weights] if in_place else []
    weights = outputs or x.weights
    snapshot, sigma = torch.empty(batch.snapshot_size), torch.empty(len(LAYERS))
    laws, vectors = Laws.of(case.law_list), [v.clone() for v in x.vectors]
    with tickets_in_any_order(3):
        ops.normalize(batch, weights, vectors, laws, case.eps, 2, outputs, snapshot, sigma, "cuda")
    assert matrix.same_bits(sigma, torch.stack(usual.sigma))
    assert all(matrix.same_bits(a, b) for a, b in zip(vectors, usual.vectors, strict=True))
    if in_place:
        assert all(matrix.same_bits(a, b) for a, b in zip(outputs, usual.normalized, strict=True))


def test_who_writes_kept_rows(gpu, monkeypatch):
    """The block that has them, mostly. One that cannot wait drops them, before their write ticket comes or after it."""
    monkeypatch.setenv("BSSN_FAST_CUDA_PLAN", "keep")
    gpu(Gpu(8, TINY.shared_bytes))
    count = cuda_emulated.library().count_claims
    case = Case(tuple((24 + 8 * j, 32, 3, 3) for j in range(6)), dims=(0,) * 6)
    met = {claims: 0 for claims in ((0, PASSED), (0, DROPPED), (DROPPED, PASSED), (PASSED, DROPPED))}
    for seed in range(40):
        before = {claims: count(*claims) for claims in met}
        with tickets_in_any_order(seed):
            matrix.check("cuda", case)
        for claims in met:
            met[claims] += count(*claims) - before[claims]
    assert all(met.values()), met
    assert met[0, DROPPED] == met[DROPPED, PASSED]


def test_an_unknown_plan_and_one_that_does_not_fit_the_launch(gpu, monkeypatch):
    monkeypatch.setenv("BSSN_FAST_CUDA_PLAN", "everything")
    with pytest.raises(ValueError, match="BSSN_FAST_CUDA_PLAN must be 'tiles', 'clusters', 'keep', not 'everything'"):
        matrix.run("cuda", Case(), matrix.inputs(Case()))
    monkeypatch.setenv("BSSN_FAST_CUDA_PLAN", "keep")
    monkeypatch.setenv("BSSN_FAST_CUDA_LAUNCH", "phases")
    with pytest.raises(ValueError, match="BSSN_FAST_CUDA_PLAN=keep needs BSSN_FAST_CUDA_LAUNCH=single"):
        matrix.run("cuda", Case(), matrix.inputs(Case()))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_layers_have_a_cluster(name, dtype):
    """Those whose rows fit into the shared memory of eight blocks; each block has a power tile of its own at most."""
    shapes = sorted(shapes_of(name), key=prod, reverse=True)
    segments, _ = order(shapes, dtype, CLUSTERS)
    whole = {layer for layer, phase, _ in segments if phase == WHOLE}
    assert [first for _, phase, first in segments if phase == WHOLE] == list(range(len(whole)))
    planned = plans(table(shapes), len(shapes), dtype, CLUSTERS)
    for layer, (shape, plan) in enumerate(zip(shapes, planned, strict=True)):
        if layer in whole:
            assert plan.power_tiles <= 8
            assert plan.write_tiles == 8
        else:
            most_rows = 8 * 8 * 15  # blocks, groups of warps, steps
            assert prod(shape) * dtype.itemsize > 0.6 * 8 * H200.shared_bytes or shape[0] > most_rows
        phases = [phase for at, phase, _ in segments if at == layer]
        assert phases == ([WHOLE] if layer in whole else [POWER, REDUCE, WRITE])


def test_a_small_model_is_all_clusters():
    """And has no tickets, so that no counter has to be cleared."""
    shapes = shapes_of("sngan_d32")
    segments, end = order(shapes, way=CLUSTERS)
    assert len(segments) == end == len(shapes)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_stay_wave_by_wave(name, dtype):
    """A wave has about one power tile for each multiprocessor, and is reduced before the next wave begins."""
    shapes = sorted(shapes_of(name), key=prod, reverse=True)
    planned = plans(table(shapes), len(shapes), dtype, KEEP)
    segments, _ = order(shapes, dtype, KEEP)
    waves, before = [[]], POWER
    for layer, phase, _ in segments:
        if phase == POWER:
            if before != POWER:
                waves.append([])
            waves[-1].append(layer)
        before = phase
    assert sorted(layer for wave in waves for layer in wave) == list(range(len(shapes)))
    place = {(layer, phase): first for layer, phase, first in segments}
    for wave, next_wave in zip(waves, [*waves[1:], []], strict=True):
        begin = min(place[layer, POWER] for layer in next_wave) if next_wave else float("inf")
        for layer in wave:
            assert place[layer, POWER] < place[layer, REDUCE] < begin
            assert place[layer, REDUCE] < place[layer, WRITE]
            assert not next_wave or place[layer, WRITE] > max(place[other, REDUCE] for other in next_wave)
        kept = [layer for layer in wave if planned[layer].keeps]
        assert sum(planned[layer].power_tiles for layer in kept) <= H200.multiprocessors


@pytest.mark.parametrize(
    ("name", "dtype", "least"),
    [
        ("sngan_d32", torch.float32, 1.0),
        ("bsn_cnn_d32", torch.float32, 1.0),
        ("bsn_resnet_d128", torch.float32, 0.75),
        ("bsn_resnet_d128", torch.bfloat16, 0.9),
        ("biggan_d128", torch.float32, 0.45),
        ("biggan_d128", torch.bfloat16, 0.75),
    ],
)
def test_how_much_stays(name, dtype, least):
    """Of all bytes, first layers aside."""
    shapes = shapes_of(name)
    stays = total = 0
    for shape, plan in zip(shapes, plans(table(shapes), len(shapes), dtype, KEEP), strict=True):
        total += prod(shape)
        if plan.keeps:
            channels = plan.stage_bytes // (prod(shape[1:]) * dtype.itemsize)
            steps = -(-plan.channels // channels)
            stays += prod(shape) * (min(plan.stages, steps) - plan.lost_stages) / steps
    assert stays / total >= least - 0.005


def test_ways_without_clusters_are_tiles(gpu, monkeypatch):
    """On GPUs that have none: a T4."""
    gpu(T4)
    case = Case(LAYERS)
    tiles = matrix.run("cuda", case, matrix.inputs(case))
    monkeypatch.setenv("BSSN_FAST_CUDA_PLAN", "clusters")
    clusters = matrix.run("cuda", case, matrix.inputs(case))
    assert all(matrix.same_bits(a, b) for a, b in zip(tiles.normalized, clusters.normalized, strict=True))
    assert [plan.power_tiles for plan in plans(table(LAYERS), len(LAYERS), way=TILES)] != [
        plan.power_tiles for plan in plans(table(LAYERS), len(LAYERS), way=CLUSTERS)
    ]
