"""BSSN_FAST_TRITON_PLAN=registers in Triton's interpreter, on CPU tensors (run by test_triton.py)."""

import pytest
import torch
from triton_concurrent import Concurrent
from triton_interpreted import FLAT, LAYERS, Problem, check

from bssn_fast.backends import reference
from bssn_fast.backends.triton import kernels, launch, prepared

SERVED = [LAYERS[0], LAYERS[1], LAYERS[5], LAYERS[6], LAYERS[7], LAYERS[9], LAYERS[10]]
"""Layers whose rows lie one behind the other, with and without wide loads, in one and two directions."""

STEPS = [
    ((5, 260, 3, 3), 0, True, "contiguous"),  # three steps in each of two blocks
    ((37, 80, 4), 0, True, "contiguous"),  # many rows in a block, several blocks
    ((1, 9000), 0, False, "contiguous"),
    ((6, 8, 3, 3), 0, True, "contiguous"),
]


@pytest.fixture
def concurrently(monkeypatch):
    """A function that has `resident` programs run at the same time, of as many as there are multiprocessors."""

    def concurrently(resident, multiprocessors=132, seed=0):
        monkeypatch.setenv("BSSN_FAST_TRITON_PLAN", "registers")
        monkeypatch.setattr(launch, "_cache", prepared.Cache())
        monkeypatch.setattr(launch, "MULTIPROCESSORS", multiprocessors)
        return Concurrent(monkeypatch, resident, seed)

    return concurrently


@pytest.mark.parametrize("resident", [1, 3, 132])
def test_fp32(concurrently, resident):
    running = concurrently(resident, seed=resident)
    check(Problem(SERVED))
    assert running.launches == 1


def test_evaluation_and_several_iterations(concurrently):
    running = concurrently(20)
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
    running = concurrently(10)
    check(Problem(SERVED[:5], dtype, out_dtype))
    assert running.launches == 1


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("resident", [1, 2, 9])
def test_several_steps_and_blocks(concurrently, resident, offset):
    """As many programs as there are tiles of rows, so that these are as large as they become."""
    multiprocessors = 9 if offset == 0 else 17
    running = concurrently(resident, multiprocessors)
    check(Problem(STEPS, offset=offset))
    assert running.launches == 1


def test_laws(concurrently):
    concurrently(5)
    check(Problem(SERVED[:5], mixed_laws=True))
