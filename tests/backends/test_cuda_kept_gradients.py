"""G that stays on the chip between <G, W> and dW: the backward pass of BSSN_FAST_CUDA_PLAN=keep."""

import itertools
from math import prod

import cuda_emulated
import matrix
import pytest
import torch
from cuda_emulated import H200, T4, TINY, Gpu, tickets_in_any_order
from cuda_planned import DOT, KEEP, SETS, SUBTRACT, backward_plan, shapes_of, table
from matrix import Case

from bssn_fast import ops
from bssn_fast.laws import CONSTANT, Law, Laws
from bssn_fast.layout import Batch

if cuda_emulated.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

DROPPED, PASSED = 1, 2
BLOCKS = 3 * H200.multiprocessors
FEW = Gpu(4, TINY.shared_bytes)  # room for 12 blocks with three rows of fp32 for each thread
LAYERS = ((200, 64, 3, 3), (96, 128), (64, 3, 3, 3), (40, 16, 4, 4), (30, 60, 3, 3), (24, 1040), (7, 8))
"""Some by rows, of which few, most or all stay; some that go through memory in order."""


@pytest.fixture(autouse=True)
def keep(gpu, monkeypatch):
    monkeypatch.setenv("BSSN_FAST_CUDA_PLAN", "keep")


@pytest.mark.parametrize("limits", [H200, T4, FEW, TINY], ids=["h200", "t4", "few", "tiny"])
@pytest.mark.parametrize("memory", matrix.MEMORY[:3])
@pytest.mark.parametrize("offset", [0, 1])
def test_agrees_with_reference(gpu, limits, memory, offset):
    """A single block, which never waits in vain, and several."""
    gpu(limits)
    types = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16))
    for seed, (weights, results) in enumerate(types):
        case = Case(LAYERS, weights, results, memory, offset=offset)
        matrix.check("cuda", case)
        with tickets_in_any_order(seed + 1):
            matrix.check("cuda", case)


@pytest.mark.parametrize("both", [True, False])
def test_laws_and_layers_that_got_no_gradient(gpu, both):
    gpu(FEW)
    for seed in (1, 2, 3, 4):
        with tickets_in_any_order(seed):
            matrix.check("cuda", Case(LAYERS, both=both, mixed_laws=True))
            matrix.check("cuda", Case(LAYERS, both=both, layers=(0, 2, 5), mixed_laws=True))


@pytest.mark.parametrize("limits", [H200, FEW], ids=["h200", "few"])
def test_slack_bounds_need_no_weights(gpu, limits):
    gpu(limits)
    for seed in (1, 2, 3, 4):
        with tickets_in_any_order(seed):
            matrix.check_slack("cuda")


class Backward:
    """Backward calls alone, of one forward call."""

    def __init__(self, case: Case, monkeypatch) -> None:
        self.x, self.layers = matrix.inputs(case), case.layer_list
        self.batch, n = Batch.of(self.x.weights, case.dim_list, case.two_sided), len(case.shapes)
        self.laws = Laws.of([Law(CONSTANT, case.scale)] * n)
        self.snapshot, self.sigma = torch.empty(self.batch.snapshot_size), torch.empty(n)
        results = [torch.empty_like(weight) for weight in self.x.weights]
        with monkeypatch.context() as patch:
            patch.setenv("BSSN_FAST_CUDA_PLAN", "tiles")
            ops.normalize(
                self.batch, self.x.weights, self.x.vectors, self.laws, 1e-12, 1, results, self.snapshot, self.sigma,
                "cuda",
            )  # fmt: skip

    def __call__(self):
        out = [torch.full_like(weight, torch.nan) for weight in self.x.weights]
        ops.normalize_backward(
            self.batch,
            self.x.grads,
            self.x.weights,
            self.layers,
            self.laws,
            self.snapshot,
            self.sigma,
            out,
            None,
            "cuda",
        )
        return out


def test_whoever_writes_bits_are_the_same(gpu, monkeypatch):
    """The block that has the rows, mostly. One that cannot wait drops them, always before their ticket comes.

    It cannot wait as it has another tile of the layer to do, without which no ticket of the second phase passes.
    """
    gpu(FEW)
    count = cuda_emulated.library().count_claims
    backward = Backward(Case(tuple((48 + 8 * j, 32, 3, 3) for j in range(6)), dims=(0,) * 6), monkeypatch)
    first = backward()
    met = {claims: 0 for claims in ((0, PASSED), (0, DROPPED), (DROPPED, PASSED), (PASSED, DROPPED))}
    for seed in range(1, 100):
        before = {claims: count(*claims) for claims in met}
        with tickets_in_any_order(seed):
            assert all(map(matrix.same_bits, backward(), first)), seed
        for claims in met:
            met[claims] += count(*claims) - before[claims]
    assert met[0, PASSED] > met[0, DROPPED] == met[DROPPED, PASSED] > 0
    assert met[PASSED, DROPPED] == 0


def test_threads_in_another_order_change_no_bit(gpu, monkeypatch):
    gpu(FEW)
    backward = Backward(Case(LAYERS), monkeypatch)
    first = backward()
    with cuda_emulated.last_thread_first():
        assert all(map(matrix.same_bits, backward(), first))


def sorted_shapes(name):
    return sorted(shapes_of(name), key=prod, reverse=True)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wave_has_a_tile_for_each_block(name, dtype):
    """And its dW is written behind the next one's <G, W>, so that there is something to do until that is added up."""
    shapes = sorted_shapes(name)
    planned, segments = backward_plan(table(shapes), len(shapes), dtype, KEEP)
    ticket = 0
    for segment in segments:
        plan = planned[segment.layer]
        assert segment.first == ticket
        assert segment.tiles == (plan.dot_tiles if segment.kind == DOT else plan.write_tiles)
        assert plan.kept_steps == 0 or plan.dot_tiles == plan.write_tiles
        ticket += segment.tiles
    for layer in range(len(shapes)):
        assert [s.kind for s in segments if s.layer == layer] == [DOT, SUBTRACT]
    # The segments are <G, W> of waves 0 and 1, dW of 0, <G, W> of 2, dW of 1 and so on.
    written = [
        [s.layer for s in run] for kind, run in itertools.groupby(segments, lambda s: s.kind) if kind == SUBTRACT
    ]
    dots = [[s.layer for s in run] for kind, run in itertools.groupby(segments, lambda s: s.kind) if kind == DOT]
    waves = [*written[:-1], *split(written[-1], dots[-1], planned)]
    assert [layer for wave in waves for layer in wave] == list(range(len(shapes)))
    assert sorted(dots[0]) == sorted(waves[0] + (waves[1] if len(waves) > 1 else []))
    assert [sorted(wave) for wave in dots[1:]] == waves[2:]
    for wave in waves:
        assert sum(planned[layer].dot_tiles for layer in wave if planned[layer].kept_steps) <= BLOCKS


def split(written, added_up, planned):
    """The last two waves, whose dW is written without a pause, if there are two."""
    first = [layer for layer in written if layer not in added_up]
    if not first:  # <G, W> of both stand together too: as many as there are blocks for
        tiles = itertools.accumulate(planned[layer].dot_tiles * (planned[layer].kept_steps > 0) for layer in written)
        first = [layer for layer, sum_so_far in zip(written, tiles, strict=True) if sum_so_far <= BLOCKS]
    last = written[len(first) :]
    return [first, last] if last else [first]


@pytest.mark.parametrize(
    ("name", "dtype", "least"),
    [
        ("sngan_d32", torch.float32, 1.0),
        ("bsn_cnn_d32", torch.float32, 1.0),
        ("bsn_resnet_d128", torch.float32, 0.76),
        ("bsn_resnet_d128", torch.bfloat16, 0.76),
        ("biggan_d128", torch.float32, 0.43),
        ("biggan_d128", torch.bfloat16, 0.71),
    ],
)
def test_how_much_stays(name, dtype, least):
    """Of all bytes, first layers aside; in three blocks of a multiprocessor."""
    shapes = sorted_shapes(name)
    planned, _ = backward_plan(table(shapes), len(shapes), dtype, KEEP)
    stays = 0
    for shape, plan in zip(shapes, planned, strict=True):
        if plan.kept_steps == 0:
            continue
        assert 80 + plan.kept_steps * 256 * 4 * dtype.itemsize <= (H200.shared_bytes + 1024) // 3 - 1024
        rows = sum(
            min(plan.kept_steps * plan.rows_at_once, plan.tile_rows, shape[0] - first)
            for first in range(0, shape[0], plan.tile_rows)
        )
        stays += prod(shape) * rows / shape[0]
    assert stays / sum(map(prod, shapes)) >= least - 0.005


def test_rows_that_are_too_many_side_by_side_stay_not():
    """One row has more tiles than there are blocks."""
    ((plan,), _) = backward_plan(table(((8, 1_000_000),)), 1, torch.float32, KEEP)
    assert plan.column_blocks > BLOCKS
    assert plan.kept_steps == 0
