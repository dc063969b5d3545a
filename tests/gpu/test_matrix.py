"""The matrix that every backend passes, on a GPU."""

import matrix
import pytest
import torch
from matrix import Case
from ways import WAYS


def cases_for(way: tuple[str, str]) -> list[Case]:
    """Return all cases, or for Triton, which takes half a minute to compile one, those that differ in one thing.

    Its kernels run all of them in the interpreter. Its ways differ in what a tile waits for and in nothing else.
    """
    if way[0] != "triton":
        return matrix.CASES
    usual = Case()
    return [
        case
        for case in matrix.CASES
        if (case.memory == usual.memory and case.both)  # all dtypes and numbers of iterations
        or (
            way[1] == "single" and case.weight_dtype == case.result_dtype == torch.float32 and case.memory != "reversed"
        )
    ]


WAYS_AND_CASES = [(way, case) for way in WAYS for case in cases_for(way)]


@pytest.mark.parametrize(
    ("way", "case"), WAYS_AND_CASES, ids=lambda x: str(x) if isinstance(x, Case) else "-".join(x), indirect=["way"]
)
def test_matrix(backend, case):
    matrix.check(backend, case, "cuda")


SMALL = [Case(shapes=((8, 5, 3, 3), (1, 300), (33, 16, 4, 4)), offset=offset) for offset in (0, 1, 3)]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"offset{case.offset}")
def test_alignment(backend, case):
    matrix.check(backend, case, "cuda")


@pytest.mark.parametrize("layers", [(0,), (2, 0), (1,)], ids=str)
def test_some_gradients_missing(backend, layers):
    matrix.check(backend, Case(shapes=((8, 5, 3, 3), (1, 300), (33, 16, 4, 4)), layers=layers), "cuda")


@pytest.mark.parametrize("magnitude", [1e-15, 1e15])
def test_magnitudes(backend, magnitude):
    matrix.check(backend, Case(shapes=((8, 5, 3, 3), (40, 300)), magnitude=magnitude), "cuda")


def test_large_layers(backend):
    """Several tiles of every kind, beside many small layers."""
    shapes = ((1024, 512, 3, 3), (512, 1024, 1, 1), (1, 16384), (256, 256, 4, 4), *((64, 64, 3, 3),) * 130)
    matrix.check(backend, Case(shapes=shapes, dims=(0,) * len(shapes)), "cuda")


def test_more_layers_than_kernel_arguments_describe(backend):
    """Of CUDA's kernels 176, of Triton's 256."""
    shapes = ((8, 5, 3, 3), (1, 30), (5, 7)) * 100
    matrix.check(backend, Case(shapes=shapes, dims=(0,) * len(shapes)), "cuda")


def test_same_bits_twice(backend):
    case = Case(shapes=((512, 256, 3, 3), (64, 3, 3, 3), (1, 8192), (300, 200)), dims=(0,) * 4)
    x = matrix.inputs(case, "cuda")
    first = matrix.run(backend, case, x)
    for _ in range(20):
        again = matrix.run(backend, case, x)
        for name in ("normalized", "vectors", "sigma", "grad_weights"):
            for a, b in zip(getattr(first, name), getattr(again, name), strict=True):
                assert torch.equal(a, b), name


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("n_power_iterations", [0, 1])
def test_weights_that_have_no_norm(backend, value, n_power_iterations):
    """sigma is 0 or NaN, the layer's vectors stay, and the other layers notice nothing."""
    case = Case(shapes=((8, 5, 3, 3), (6, 7, 3, 3)), n_power_iterations=n_power_iterations)
    x = matrix.inputs(case, "cuda")
    clean = matrix.run(backend, case, x)
    if value == 0:
        x.weights[0].zero_()
    else:
        x.weights[0].view(-1)[17] = value
    found = matrix.run(backend, case, x)
    assert found.sigma[0] == 0 if value == 0 else found.sigma[0].isnan()
    assert (found.normalized[0] == 0).all() if value == 0 else found.normalized[0].isnan().all()
    for old, new in zip(x.vectors[:4], found.vectors[:4], strict=True):
        assert torch.equal(old, new)
    assert torch.equal(clean.normalized[1], found.normalized[1])
    assert torch.equal(clean.grad_weights[1], found.grad_weights[1])
