"""The Triton kernels in Triton's interpreter, on CPU tensors, against the reference in fp64 (run by test_triton.py)."""

from dataclasses import dataclass, field

import matrix
import pytest
import torch
import triton.language as tl
from triton_concurrent import wait_in_order

from bssn_fast import layout
from bssn_fast.backends import reference, triton
from bssn_fast.backends.triton import fields, geometry, launch, prepared, tiles
from bssn_fast.laws import AT_MOST, CONSTANT, GAIN, Law, Laws

SCALE, EPS = 1.3, 1e-12
MARGIN = 8
"""Elements on either side of every output, which must stay untouched."""

LAYERS = [  # (shape, output dimension, two-sided, memory format)
    ((6, 8, 3, 3), 0, True, "contiguous"),
    ((5, 3, 3, 3), 0, True, "contiguous"),  # rows of 27 elements: no wide loads
    ((8, 6, 4, 4), 1, True, "contiguous"),  # transposed convolution
    ((8, 8, 3, 3), 0, True, "channels_last"),
    ((3, 5, 2, 2), 1, True, "channels_last"),
    ((1, 40), 0, False, "contiguous"),
    ((7, 13), 0, False, "contiguous"),
    ((9, 16, 3, 3), 0, False, "contiguous"),  # one direction of a convolution
    ((12, 8, 5), 1, False, "contiguous"),
    ((6, 2, 7, 7), 0, True, "contiguous"),
    ((4, 4, 2, 3, 2), 0, True, "contiguous"),
    ((10, 6), 0, False, "transposed"),
    ((40, 260, 3), 0, True, "contiguous"),  # several tiles of rows and of columns, several steps in each
    ((2, 3, 3, 3), 0, True, "kernel_transposed"),  # not addressable: computed by the reference
]

FLAT = [  # rows that are one run of memory, in tiles of every kind
    ((5, 260, 3, 3), 0, True, "contiguous"),  # a few steps, which are no power of two
    ((3, 800, 3, 3), 0, True, "contiguous"),  # two long rows at a time
    ((37, 80, 4), 0, True, "contiguous"),  # tiles of more rows than they hold at a time
    ((130, 3, 3, 3), 0, True, "contiguous"),  # short rows, many in a tile
    ((33, 8, 41), 0, True, "contiguous"),
    ((3, 5, 300), 0, True, "contiguous"),  # more kernel positions than a column tile has lanes
    ((3, 2, 2048), 0, True, "contiguous"),  # as many as there may be
    ((2, 3, 1373), 0, True, "contiguous"),  # a step without room for whole vectors
    ((1, 24, 4, 4), 0, True, "contiguous"),
    ((1, 1, 3, 3), 0, True, "contiguous"),
    ((1, 9000), 0, False, "contiguous"),
    ((300, 10), 0, False, "contiguous"),
]


@dataclass
class Problem:
    """Layers with random weights and vectors, poisoned outputs, and what surrounds them."""

    layers: list = field(default_factory=lambda: LAYERS)
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype | None = None
    n_power_iterations: int = 1
    offset: int = 0  # elements by which tensors start off their alignment
    seed: int = 0
    mixed_laws: bool = False  # scale / sigma, a slack bound, a tight one and a gain by turns

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.out_dtype = self.out_dtype or self.dtype
        self.compute_dtype = layout.compute_dtype(self.dtype)
        self.buffers = []
        self.weights, self.vectors = [], []
        for shape, dim, two, memory in self.layers:
            random = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.weights.append(self.like(random, memory, self.dtype).copy_(random))
            for size in layout.vector_sizes(shape, dim, two):
                v = torch.randn(size, generator=generator, dtype=torch.float64)
                self.vectors.append(self.empty(size, self.compute_dtype).copy_(v / v.norm()))
        _, dims, two_sided, _ = zip(*self.layers, strict=True)
        self.batch = layout.Batch.of(self.weights, dims, two_sided)
        constant = Law(CONSTANT, SCALE)
        turns = (constant, Law(AT_MOST, 1e6), Law(AT_MOST, 0.1), Law(GAIN, 0.0)) if self.mixed_laws else (constant,)
        laws = [turns[j % len(turns)] for j in range(len(self.layers))]
        learned = [j for j, law in enumerate(laws) if law.kind == GAIN]
        self.gains = [self.empty(1, self.compute_dtype).fill_(0.6 + 0.1 * j) for j in learned]
        self.laws = Laws.of(laws).with_gains(self.gains)
        self.poison_outputs()
        self.grads = []
        for (shape, _, _, memory), weight in zip(self.layers, self.weights, strict=True):
            random = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.grads.append(self.like(random, memory, self.out_dtype).copy_(random))
            assert self.grads[-1].stride() == weight.stride()

    def empty(self, size, dtype):
        """A flat tensor of NaN with a margin on either side."""
        buffer = torch.full((size + 2 * MARGIN + self.offset,), torch.nan, dtype=dtype)
        start = MARGIN + self.offset
        self.buffers.append((buffer, start, size))
        return buffer[start : start + size]

    def like(self, x, memory, dtype):
        """A tensor of NaN in x's shape with the strides that `memory` names."""
        flat = self.empty(x.numel(), dtype)
        if memory == "channels_last":
            strides = torch.empty(x.shape).to(memory_format=torch.channels_last).stride()
        elif memory == "transposed":
            strides = (1, x.shape[0])
        elif memory == "kernel_transposed":
            strides = torch.empty(x.shape).mT.contiguous().mT.stride()
        else:
            strides = x.contiguous().stride()
        return flat.as_strided(x.shape, strides)

    def poison_outputs(self):
        memories = [memory for _, _, _, memory in self.layers]
        self.normalized = [self.like(w, m, self.out_dtype) for w, m in zip(self.weights, memories, strict=True)]
        self.grad_weights = [self.like(w, m, self.dtype) for w, m in zip(self.weights, memories, strict=True)]
        self.snapshot = self.empty(self.batch.snapshot_size, self.compute_dtype)
        self.sigma = self.empty(len(self.layers), self.compute_dtype)
        self.grad_gains = self.empty(len(self.gains), self.compute_dtype) if self.gains else None

    def snapshots(self):
        sizes = [layout.vector_sizes(s, d, t) for s, d, t, _ in self.layers]
        return [
            self.snapshot[start : start + size]
            for starts, layer_sizes in zip(self.batch.snapshot_offsets, sizes, strict=True)
            for start, size in zip(starts, layer_sizes, strict=True)
        ]

    def forward(self, backend=triton):
        backend.forward(
            self.batch,
            self.weights,
            self.vectors,
            self.laws,
            EPS,
            self.n_power_iterations,
            self.normalized,
            self.snapshot,
            self.sigma,
        )
        return self

    def backward(self, backend=triton, layers=None):
        layers = list(range(len(self.layers))) if layers is None else layers
        backend.backward(
            self.batch,
            [self.grads[j] for j in layers],
            self.weights,
            layers,
            self.laws,
            self.snapshot,
            self.sigma,
            [self.grad_weights[j] for j in layers],
            self.grad_gains if any(self.laws.kinds[j] == GAIN for j in layers) else None,
        )
        return self

    def results(self):
        return {
            "normalized": self.normalized,
            "grad_weights": self.grad_weights,
            "vectors": self.vectors,
            "snapshot": self.snapshots(),
            "sigma": [self.sigma],
            "grad_gains": [] if self.grad_gains is None else [self.grad_gains],
        }

    def check_margins(self):
        for buffer, start, size in self.buffers:
            assert buffer[:start].isnan().all()
            assert buffer[start + size :].isnan().all()

    def copy(self, dtype, out_dtype=None):
        """The same problem, not yet run, in other dtypes."""
        other = Problem(self.layers, dtype, out_dtype, self.n_power_iterations, mixed_laws=self.mixed_laws)
        for mine, others in ((self.weights, other.weights), (self.vectors, other.vectors), (self.grads, other.grads)):
            for x, y in zip(mine, others, strict=True):
                y.copy_(x)
        return other


def error(x, exact):
    """Relative error in the Euclidean norm; the error itself where the exact result is 0."""
    return ((x.double() - exact).norm() / (exact.norm() if exact.norm() > 0 else 1)).item()


def check(problem):
    """Run forward and backward: errors against fp64 are at most four times those of the reference in the same dtype."""
    exact = problem.copy(torch.float64).forward(reference).backward(reference).results()
    same = problem.copy(problem.dtype, problem.out_dtype).forward(reference).backward(reference).results()
    problem.forward().backward()
    problem.check_margins()
    for name, values in problem.results().items():
        floor = 8 * torch.finfo(values[0].dtype).eps if values and values[0].dtype.itemsize >= 4 else 0
        for j, (x, y, z) in enumerate(zip(values, exact[name], same[name], strict=True)):
            assert error(x, y) <= max(4 * error(z, y), floor), (name, j)


@pytest.fixture(autouse=True)
def in_order(monkeypatch):
    """The interpreter runs programs one after the other: one that would wait for a later one must not hang."""
    monkeypatch.setattr(tiles, "wait_for", wait_in_order)


@pytest.fixture(params=["single", "phases"])
def mode(request, monkeypatch):
    monkeypatch.setenv("BSSN_FAST_TRITON_LAUNCH", request.param)
    return request.param


@pytest.mark.parametrize(("mode", "n_power_iterations"), [("single", 0), ("single", 1), ("phases", 2)])
def test_fp32(monkeypatch, mode, n_power_iterations):
    monkeypatch.setenv("BSSN_FAST_TRITON_LAUNCH", mode)
    check(Problem(n_power_iterations=n_power_iterations))


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.float64, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.bfloat16),
    ],
)
def test_dtypes(dtype, out_dtype):
    check(Problem(LAYERS[:8], dtype, out_dtype))


def test_mixed_laws(mode):
    """Of the last layer too, which the reference computes, and in evaluation."""
    check(Problem([LAYERS[-1], *LAYERS[:7]], mixed_laws=True))
    check(Problem([*LAYERS[2:5], LAYERS[-1]], n_power_iterations=0, mixed_laws=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mixed_laws_of_other_dtypes(dtype):
    check(Problem(LAYERS[:4], dtype, mixed_laws=True))


def test_a_slack_bound_needs_no_look_at_the_weight_in_backward(mode):
    matrix.check_slack("triton")


def test_some_gradients_of_gains_missing():
    layers = [*LAYERS[:7], LAYERS[-1]]
    problem, exact = (Problem(layers, dtype, mixed_laws=True) for dtype in (torch.float32, torch.float64))
    problem.forward().backward(layers=[7, 2])
    exact.forward(reference).backward(reference, layers=[7, 2])
    assert error(problem.grad_gains[:1], exact.grad_gains[:1]) < 1e-5
    assert problem.grad_gains[1:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unaligned(dtype):
    check(Problem(LAYERS[:4], dtype, offset=1))


@pytest.mark.parametrize(
    ("launch_mode", "dtype", "offset", "row_tiles"),
    [
        ("single", torch.float32, 0, 2),
        ("phases", torch.float32, 1, 64),
        ("single", torch.bfloat16, 0, 2),
        ("phases", torch.float64, 0, 2),
    ],
)
def test_flat_rows(monkeypatch, launch_mode, dtype, offset, row_tiles):
    monkeypatch.setenv("BSSN_FAST_TRITON_LAUNCH", launch_mode)
    monkeypatch.setattr(geometry, "MAX_ROW_TILES", row_tiles)
    check(Problem(FLAT[2:] if dtype == torch.float64 else FLAT, dtype, offset=offset))  # 8 roundings are few for 7200


def test_modes_and_repetitions_give_the_same_bits(monkeypatch):
    results = []
    for mode in ("single", "single", "phases"):
        monkeypatch.setenv("BSSN_FAST_TRITON_LAUNCH", mode)
        results.append(Problem([*LAYERS[:5], LAYERS[-2]]).forward().backward().results())
    for other in results[1:]:
        for name, values in results[0].items():
            for x, y in zip(values, other[name], strict=True):
                assert torch.equal(x, y), name


def test_one_program_serves_many_calls(mode):
    problem = Problem(LAYERS[:2])
    exact = problem.copy(torch.float64)
    for _ in range(3):
        problem.poison_outputs()
        exact.forward(reference).backward(reference)
        problem.forward().backward()
    for name, values in problem.results().items():
        for x, y in zip(values, exact.results()[name], strict=True):
            assert error(x, y) < 1e-5, name


def test_some_gradients_missing():
    problem = Problem(LAYERS[:4]).forward()
    exact = Problem(LAYERS[:4], torch.float32).forward(reference).backward(reference)
    problem.backward(layers=[3, 1])
    for j in (1, 3):
        assert error(problem.grad_weights[j], exact.grad_weights[j].double()) < 1e-5
    for j in (0, 2):
        assert problem.grad_weights[j].isnan().all()


def test_many_layers_are_one_launch(monkeypatch):
    """More gradients than arguments, and more segments than are looked at at once."""
    for module in (launch, prepared):
        monkeypatch.setattr(module, "MAX_ARGUMENTS", 2)
    monkeypatch.setattr(fields, "SEARCH_AT_ONCE", tl.constexpr(4))
    started = []
    run = launch._run
    monkeypatch.setattr(launch, "_run", lambda *a, **k: started.append(1) or run(*a, **k))
    check(Problem(LAYERS[:5], seed=1))
    assert len(started) == 2


def test_one_dominant_input_direction():
    """An unfolding without the permutation gives a wrong sigma here."""
    problem = Problem(
        [((6, 4, 3, 3), 0, True, "contiguous"), ((4, 4, 3, 3), 0, True, "contiguous")], n_power_iterations=6
    )
    for weight in problem.weights:
        weight[:, 1] *= 50
    check(problem)
    for j, weight in enumerate(problem.weights):
        out_side = torch.linalg.matrix_norm(weight.flatten(1).double(), 2)
        in_side = torch.linalg.matrix_norm(weight.transpose(0, 1).flatten(1).double(), 2)
        assert problem.sigma[j].item() == pytest.approx(((out_side + in_side) / 2).item(), rel=1e-4)


def test_zero_weight():
    problem = Problem(LAYERS[:3])
    stored = [v.clone() for v in problem.vectors]
    problem.weights[0].zero_()
    problem.forward().backward()
    assert problem.sigma[0] == 0
    assert (problem.normalized[0] == 0).all()
    assert (problem.grad_weights[0] == 0).all()
    for v, before, kept in zip(problem.vectors[:4], stored, problem.snapshots(), strict=False):
        assert torch.equal(v, before)
        assert torch.equal(v, kept)
    assert not torch.equal(problem.vectors[4], stored[4])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n_power_iterations", [0, 1])
def test_weight_not_finite(value, n_power_iterations):
    problem = Problem(LAYERS[:3], n_power_iterations=n_power_iterations)
    stored = [v.clone() for v in problem.vectors]
    problem.weights[0][2, 3, 1, 1] = value
    problem.forward().backward()
    assert problem.sigma[0].isnan()
    assert problem.normalized[0].isnan().all()
    for v, before in zip(problem.vectors[:4], stored, strict=False):
        assert torch.equal(v, before)
    assert problem.sigma[1:].isfinite().all()
    assert all(x.isfinite().all() for x in problem.normalized[1:] + problem.grad_weights[1:])


def test_vector_in_the_null_space():
    """The first product is 0: the vectors stay, and sigma is 0, as in the reference."""
    problem = Problem([((4, 8), 0, False, "contiguous")])
    problem.weights[0][:, 0] = 0
    problem.vectors[1].zero_()[0] = 1
    exact = problem.copy(torch.float64).forward(reference)
    problem.forward()
    assert exact.sigma == 0
    assert problem.sigma == 0
    assert torch.equal(problem.vectors[1].double(), exact.vectors[1])


@pytest.mark.parametrize("factor", [1e-15, 1e15])
def test_small_and_large_weights(factor):
    """At 1e-15 eps matters: the new vectors are shorter than 1, as in the reference."""
    problem = Problem(LAYERS[:4])
    for weight in problem.weights:
        weight *= factor
    exact = problem.copy(torch.float64).forward(reference)
    problem.forward()
    for name in ("vectors", "normalized", "sigma"):
        for x, y in zip(problem.results()[name], exact.results()[name], strict=True):
            assert error(x, y) < 1e-5, name


def test_layers_left_to_the_reference():
    problem = Problem(
        [LAYERS[0], ((2, 0, 3, 3), 0, True, "contiguous"), ((2, 2, 2100), 0, True, "contiguous"), LAYERS[-1]]
    )
    exact = problem.copy(torch.float64).forward(reference).backward(reference)
    problem.forward().backward()
    problem.check_margins()
    for name, values in problem.results().items():
        for x, y in zip(values, exact.results()[name], strict=True):
            assert error(x, y) < 1e-5, name
