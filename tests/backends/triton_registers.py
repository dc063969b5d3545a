"""BSSN_FAST_TRITON_PLAN=registers in Triton's interpreter, on CPU tensors (run by test_triton.py)."""

import pytest
import torch
from triton_concurrent import Concurrent
from triton_interpreted import LAYERS, Problem, check

from bssn_fast.backends import reference
from bssn_fast.backends.triton import kernels, launch, prepared

SERVED = [LAYERS[0], LAYERS[1], LAYERS[5], LAYERS[6], LAYERS[7], LAYERS[9], LAYERS[10]]
"""Layers whose rows lie one behind the other, with and without wide loads, in one and two directions."""

STEPS = [
    ((9, 260, 3, 3), 0, True, "contiguous"),  # three steps in each of two blocks
    ((37, 80, 4), 0, True, "contiguous"),  # five blocks
    ((1, 9000), 0, False, "contiguous"),
    ((70, 8, 3, 3), 0, True, "contiguous"),  # five blocks of many rows, of which the last has few
]


@pytest.fixture
def concurrently(monkeypatch):
    """A function that has `resident` programs run at the same time, of as many as there are multiprocessors."""

    def concurrently(resident, multiprocessors=132, seed=None):
        monkeypatch.setenv("BSSN_FAST_TRITON_PLAN", "registers")
        monkeypatch.setattr(launch, "_cache", prepared.Cache())
        monkeypatch.setattr(launch, "MULTIPROCESSORS", multiprocessors)
        return Concurrent(monkeypatch, resident, seed)

    return concurrently


def same_bits(one, other):
    for name, values in one.items():
        for x, y in zip(values, other[name], strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize(("resident", "seed"), [(1, None), (3, 0), (132, 1), (132, None)])
def test_fp32(concurrently, resident, seed):
    running = concurrently(resident, seed=seed)
    check(Problem(SERVED))
    assert running.launches == 1
    if resident == 1:
        assert running.kept == 0  # one program has taken all rows
    if seed is None and resident > 1:
        assert (running.kept, running.dropped) == (4, 3)  # what is dropped has smaller tiles than the rest


def test_evaluation_and_several_iterations(concurrently):
    running = concurrently(20, seed=0)
    check(Problem(SERVED[:4], n_power_iterations=0))
    check(Problem(SERVED[:4], n_power_iterations=3))
    assert running.launches == 2  # the last iteration writes


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.float64, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_dtypes(concurrently, dtype, out_dtype):
    running = concurrently(10, seed=0)
    check(Problem(SERVED[:5], dtype, out_dtype))
    assert running.launches == 1
    assert running.kept > 0


@pytest.mark.parametrize(("offset", "multiprocessors", "pieces"), [(0, 6, {(2, 3), (5, 1)}), (1, 8, {(1, 5), (5, 1)})])
def test_several_blocks_and_steps(concurrently, monkeypatch, offset, multiprocessors, pieces):
    """As many programs as there are tiles of rows, so that these are as large as they become; in any order."""
    results, shapes = [], []
    build = launch.build
    monkeypatch.setattr(launch, "build", lambda *a, **k: shapes.append(build(*a, **k)) or shapes[-1])
    for resident, seed in ((multiprocessors, None), (multiprocessors, 0), (2, 1), (1, None)):
        running = concurrently(resident, multiprocessors, seed)
        problem = Problem(STEPS, offset=offset)
        check(problem)
        results.append(problem.results())
        assert running.launches == 1
        assert running.kept + running.dropped == multiprocessors
    assert pieces <= {shape[-2:] for shape in shapes[0].shapes}
    for other in results[1:]:
        same_bits(results[0], other)


def test_weights_are_read_once(concurrently, monkeypatch):
    """Nothing of them is left when the rows' products are added up."""
    concurrently(132)
    problem = Problem(STEPS[:1])
    exact = problem.copy(torch.float32).forward(reference).results()["normalized"][0]
    columns_tile = kernels.columns_tile

    def after_the_rows(*arguments):
        problem.weights[0].fill_(torch.nan)
        columns_tile(*arguments)

    monkeypatch.setattr(kernels, "columns_tile", after_the_rows)
    problem.forward()
    assert problem.weights[0].isnan().all()
    torch.testing.assert_close(problem.normalized[0], exact)


def test_laws(concurrently):
    concurrently(5, seed=0)
    check(Problem(SERVED[:5], mixed_laws=True))


def test_same_bits_as_tiles_of_the_same_size(concurrently, monkeypatch):
    """And a program for each plan is kept."""
    running = concurrently(132)
    problem = Problem(SERVED)
    results = []
    vectors = [v.clone() for v in problem.vectors]
    for plan in ("registers", "tiles", "registers"):
        monkeypatch.setenv("BSSN_FAST_TRITON_PLAN", plan)
        for result in (*problem.normalized, *problem.grad_weights, problem.sigma):  # at the same addresses each time
            result.fill_(torch.nan)
        for v, before in zip(problem.vectors, vectors, strict=True):
            v.copy_(before)
        found = problem.forward().backward().results()
        results.append({name: [x.clone() for x in values] for name, values in found.items()})
    assert running.launches == 2
    for other in results[1:]:
        same_bits(results[0], other)


def test_one_program_serves_many_calls(concurrently):
    running = concurrently(7, seed=0)
    problem = Problem(SERVED[:3])
    exact = problem.copy(torch.float64)
    for resident in (7, 1, 20):
        running.resident = resident
        problem.poison_outputs()
        exact.forward(reference)
        problem.forward()
    assert running.launches == 3
    for x, y in zip(problem.normalized, exact.normalized, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "multiprocessors", "mode"),
    [
        ([LAYERS[0], LAYERS[2]], 132, "single"),  # a transposed convolution
        ([LAYERS[0], LAYERS[3]], 132, "single"),  # channels_last
        (STEPS, 5, "single"),  # a tile more than there are programs
        ([((2, 10000), 0, False, "contiguous"), ((1, 40000), 0, False, "contiguous")], 132, "single"),  # a long row
        (SERVED[:2], 132, "phases"),
    ],
)
def test_other_models_take_tiles(concurrently, monkeypatch, layers, multiprocessors, mode):
    running = concurrently(132, multiprocessors)
    monkeypatch.setenv("BSSN_FAST_TRITON_LAUNCH", mode)
    check(Problem(layers))
    assert running.launches == 0


def test_unknown_plan(monkeypatch):
    monkeypatch.setenv("BSSN_FAST_TRITON_PLAN", "slabs")
    with pytest.raises(ValueError, match="BSSN_FAST_TRITON_PLAN must be tiles or registers, not 'slabs'"):
        Problem(LAYERS[:1]).forward()
