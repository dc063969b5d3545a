"""Random calls of the CUDA kernels in the emulation, their tickets in any order that the waits allow.

BSSN_FAST_RANDOM_CALLS=10000 runs as many instead of the few hundred of the suite.
"""

import os
import random

import cuda_emulated
import matrix
import pytest
import torch
from cuda_emulated import H200, T4, TINY, tickets_in_any_order
from matrix import MEMORY, Case

if cuda_emulated.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

CALLS = int(os.environ.get("BSSN_FAST_RANDOM_CALLS", "320"))
PARTS = 8
HALF = (torch.bfloat16, torch.float16)
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 33, 64, 100, 130)
KERNELS = ((), (1,), (2,), (3,), (5,), (15,), (41,), (300,), (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (2, 3, 3))
LARGEST = 20_000


def random_shape(rng: random.Random) -> tuple[int, ...]:
    while True:
        shape = (rng.choice(SIZES), rng.choice(SIZES), *rng.choice(KERNELS))
        if torch.Size(shape).numel() <= LARGEST:
            return shape


def random_case(rng: random.Random) -> Case:
    shapes = [random_shape(rng) for _ in range(rng.randint(1, 7))]
    if rng.random() < 0.1:
        shapes[0] = rng.choice([(1, 40_000), (3, 15_001), (2, 600, 5, 5), (2, 5, 600)])
    weights = rng.choice([torch.float32, torch.float32, *HALF])
    return Case(
        shapes=tuple(shapes),
        dims=tuple(rng.randint(0, 1) for _ in shapes),
        weight_dtype=weights,
        result_dtype=rng.choice([weights, weights, torch.bfloat16]),
        memory=rng.choice(MEMORY),
        both=rng.random() < 0.7,
        n_power_iterations=rng.choice([0, 1, 1, 1, 2, 3]),
        offset=rng.choice([0, 0, 1, 2]),
        magnitude=10.0 ** rng.randint(-4, 4),
        seed=rng.randrange(1 << 30),
    )


@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(gpu, monkeypatch, part):
    for number in range(part, CALLS, PARTS):
        rng = random.Random(number)
        case, limits, seed = random_case(rng), rng.choice([H200, T4, TINY]), rng.randrange(1, 1 << 60)
        way = rng.choice(["tiles", "tiles", "phases", "clusters", "keep", "keep"])
        monkeypatch.setenv("BSSN_FAST_CUDA_LAUNCH", "phases" if way == "phases" else "single")
        monkeypatch.setenv("BSSN_FAST_CUDA_PLAN", "tiles" if way == "phases" else way)
        gpu(limits)
        with tickets_in_any_order(seed):
            try:
                matrix.check("cuda", case)
            except Exception as error:
                raise AssertionError(f"call {number}: {case!r} on {limits}, {way}, order {seed}: {error}") from error


@pytest.mark.parametrize("plan", ["tiles", "clusters", "keep"])
def test_same_bits_in_any_order(gpu, monkeypatch, plan):
    monkeypatch.setenv("BSSN_FAST_CUDA_PLAN", plan)
    shapes = (*matrix.SHAPES, (200, 70, 3, 3), (3, 15_001), (1, 40_000))
    for memory in MEMORY[:3]:
        case = Case(shapes=shapes, memory=memory, n_power_iterations=2)
        one = matrix.run("cuda", case, matrix.inputs(case))
        for seed in (4, 5, 6, 7):
            with tickets_in_any_order(seed):
                other = matrix.run("cuda", case, matrix.inputs(case))
            matrix.assert_same(one, other)
