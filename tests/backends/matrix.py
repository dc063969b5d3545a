"""What every backend must do, as cases that know nothing of the backend: `check(backend, case, device)`.

Tolerances come from float64. The exact result is the reference in float64 on the very same inputs; the error of a
backend may be FACTOR times that of the reference at the inputs' own precision, and FLOOR units of rounding more, for
where that one happens to be exact.
"""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from torch import Tensor

from bssn_fast import ops
from bssn_fast.laws import AT_MOST, CONSTANT, GAIN, Law, Laws
from bssn_fast.layout import Batch, compute_dtype, input_dimension, needs_two_sides, vector_sizes
from bssn_fast.reference import power_iteration, unfold, unit

FACTOR = 3.0
FACTOR_HALF = 1.2  # where rounding the result to 16 bits is the error; cutting digits off would double it
FLOOR = 4

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (
    # weights, results
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
)
MEMORY = ("contiguous", "channels_last", "transposed", "reversed")

SHAPES = (
    (8, 5, 3, 3),
    (1, 300),
    (64, 3, 3, 3),
    (33, 17, 4, 4),
    (5, 7),
    (20, 6, 15),
    (130, 30, 3, 3),
    (12, 9, 5, 5),
    (3, 4, 7, 7),
    (40, 8, 41),
    (6, 5, 2, 3, 3),
    (1, 1, 3, 3),
    (1, 1),
    (1, 24, 4, 4),
    (256, 16, 1, 1),
    (9, 1, 2, 2),
    (1, 37, 1, 1),
    (300, 33),
)
"""One call of many layers: rows shorter and longer than any vector, kernels of odd, even and long periods, heads."""


@dataclass(frozen=True)
class Case:
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    weight_dtype: torch.dtype = torch.float32
    result_dtype: torch.dtype = torch.float32
    memory: str = "contiguous"
    both: bool = True
    n_power_iterations: int = 1
    dims: tuple[int, ...] | None = None  # alternating by default
    layers: tuple[int, ...] | None = None  # of the backward; all by default
    offset: int = 0  # elements by which weights, gradients and results miss the alignment of an allocation
    magnitude: float = 1.0
    scale: float = 1.3
    mixed_laws: bool = False  # scale / sigma, a slack bound, a tight one and a gain by turns
    eps: float = 1e-12
    seed: int = 0

    def __str__(self) -> str:
        sides = "both" if self.both else "one"
        types = "-".join(str(t).removeprefix("torch.") for t in dict.fromkeys((self.weight_dtype, self.result_dtype)))
        laws = "-laws" if self.mixed_laws else ""
        return f"{types}-{self.memory}-{sides}-{self.n_power_iterations}{laws}"

    @property
    def two_sided(self) -> list[bool]:
        return [self.both and needs_two_sides(s) for s in self.shapes]

    @property
    def dim_list(self) -> list[int]:
        return list(self.dims) if self.dims is not None else [j % 2 for j in range(len(self.shapes))]

    @property
    def layer_list(self) -> list[int]:
        return list(self.layers) if self.layers is not None else list(range(len(self.shapes)))

    @property
    def law_list(self) -> list[Law]:
        constant = Law(CONSTANT, self.scale)
        if not self.mixed_laws:
            return [constant] * len(self.shapes)
        turns = constant, Law(AT_MOST, 1e6 * self.magnitude), Law(AT_MOST, 0.1 * self.magnitude), Law(GAIN, 0.0)
        return [turns[j % 4] for j in range(len(self.shapes))]


CASES = [
    *(
        Case(weight_dtype=w, result_dtype=r, memory=m, both=both)
        for (w, r), m, both in itertools.product(DTYPES, MEMORY, (True, False))
    ),
    *(
        Case(weight_dtype=t, result_dtype=t, memory=m, both=both, n_power_iterations=n)
        for t, m, both, n in itertools.product((torch.float32, torch.bfloat16), MEMORY[:3], (True, False), (0, 3))
    ),
    *(
        Case(weight_dtype=t, result_dtype=t, memory=m, n_power_iterations=n, mixed_laws=True)
        for t, m, n in itertools.product((torch.float32, torch.bfloat16), MEMORY[:2], (0, 1))
    ),
]


def place(weight: Tensor, memory: str, offset: int = 0) -> Tensor:
    """The same numbers in another order of memory, `offset` elements into an allocation."""
    order = list(range(weight.ndim))
    if memory == "channels_last":
        order = [0, *order[2:], 1]
    elif memory == "transposed":
        order = [1, 0, *order[2:]]
    elif memory == "reversed":
        order.reverse()
    elif memory == "shuffled":  # one of all orders, another one for each shape
        random.Random(str(tuple(weight.shape))).shuffle(order)
    else:
        assert memory == "contiguous"
    stored = weight.permute(order)
    room = torch.empty(offset + weight.numel(), dtype=weight.dtype, device=weight.device)
    target = room[offset:].view(stored.shape)
    target.copy_(stored)
    return target.permute([order.index(d) for d in range(weight.ndim)])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that holds for NaN too."""
    bits = [t.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and torch.equal(*bits)


@dataclass
class Inputs:
    weights: list[Tensor]
    vectors: list[Tensor]
    grads: list[Tensor]
    gains: list[Tensor] = field(default_factory=list)


@dataclass
class Results:
    normalized: list[Tensor]
    vectors: list[Tensor]
    snapshot: list[Tensor] = field(default_factory=list)
    sigma: list[Tensor] = field(default_factory=list)
    grad_weights: list[Tensor] = field(default_factory=list)
    grad_gains: list[Tensor] = field(default_factory=list)


def inputs(case: Case, device: str = "cpu") -> Inputs:
    """Random inputs, the same on every device."""
    generator = torch.Generator().manual_seed(case.seed)
    working = compute_dtype(case.weight_dtype)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights, vectors, grads = [], [], []
    for shape, dim, both in zip(case.shapes, case.dim_list, case.two_sided, strict=True):
        weight = normal(shape).mul_(case.magnitude)
        first = tuple(unit(normal((size,)), case.eps) for size in vector_sizes(shape, dim, both))
        if case.n_power_iterations == 0:  # as in evaluation: random vectors would give a sigma of mere rounding errors
            first = power_iteration(weight, first, dim, case.eps)
        weights.append(place(weight.to(case.weight_dtype).to(device), case.memory, case.offset))
        vectors.extend(v.to(working).to(device) for v in first)
        grads.append(place(normal(shape).to(case.result_dtype).to(device), case.memory, case.offset))
    gains = [torch.full((1,), 0.6 + 0.1 * j, dtype=working) for j, law in enumerate(case.law_list) if law.kind == GAIN]
    return Inputs(weights, vectors, [grads[j] for j in case.layer_list], [g.to(device) for g in gains])


def in_dtype(x: Inputs, dtype: torch.dtype) -> Inputs:
    return Inputs(*([t.to(dtype) for t in part] for part in (x.weights, x.vectors, x.grads, x.gains)))


MARGIN = 64


class Poisoned:
    """Tensors like others, full of NaN, with NaN before and behind them, where nothing may be written."""

    def __init__(self, like: list[Tensor], dtype: torch.dtype, offset: int = 0) -> None:
        sizes, self.begin = [t.numel() + 2 * MARGIN + offset for t in like], MARGIN + offset
        self.rooms = [
            torch.full((n,), float("nan"), dtype=dtype, device=t.device) for n, t in zip(sizes, like, strict=True)
        ]
        self.tensors = [r.as_strided(t.shape, t.stride(), self.begin) for r, t in zip(self.rooms, like, strict=True)]

    def check(self) -> None:
        for room in self.rooms:
            assert room[: self.begin].isnan().all(), "written before the beginning"
            assert room[-MARGIN:].isnan().all(), "written behind the end"


def run(backend: str, case: Case, x: Inputs, result_dtype: torch.dtype | None = None) -> Results:
    """Run forward and backward on copies of the vectors; check that nothing else is written but the results."""
    result_dtype = result_dtype or case.result_dtype
    working, device = x.vectors[0].dtype, x.weights[0].device
    dims, both, layers = case.dim_list, case.two_sided, case.layer_list
    batch = Batch.of(x.weights, dims, both)
    before = [t.clone() for t in (*x.weights, *x.grads)]
    vectors = [v.clone() for v in x.vectors]
    out = Poisoned(x.weights, result_dtype, case.offset)
    memory = Poisoned([torch.empty(batch.snapshot_size, device=device), torch.empty(len(dims), device=device)], working)
    snapshot, sigma = memory.tensors
    laws = Laws.of(case.law_list).with_gains(x.gains)
    ops.normalize(
        batch, x.weights, vectors, laws, case.eps, case.n_power_iterations, out.tensors, snapshot, sigma,
        backend,
    )  # fmt: skip
    grad_out = Poisoned([x.weights[j] for j in layers], x.weights[0].dtype, case.offset)
    gained = [j for j in layers if laws.kinds[j] == GAIN]
    gain_out = Poisoned([torch.empty(len(gained), device=device)], working)
    grad_gains = gain_out.tensors[0] if gained else None
    ops.normalize_backward(
        batch, x.grads, x.weights, layers, laws, snapshot, sigma, grad_out.tensors, grad_gains, backend
    )
    for poisoned in (out, memory, grad_out, gain_out):
        poisoned.check()
    for old, new in zip(before, (*x.weights, *x.grads), strict=True):
        assert same_bits(old, new), "an input was changed"
    kept = [v for vectors_of_layer in batch.snapshot_views(snapshot) for v in vectors_of_layer]
    return Results(out.tensors, vectors, kept, list(sigma), grad_out.tensors, list(gain_out.tensors[0]))


def assert_same(one: Results, other: Results) -> None:
    """Every result has the same bits."""
    for part in ("normalized", "vectors", "snapshot", "sigma", "grad_weights"):
        for a, b in zip(getattr(one, part), getattr(other, part), strict=True):
            assert same_bits(a, b), part


def errors(found: Results, exact: Results, case: Case) -> dict[str, list[float]]:
    """Errors relative to what a result's size is made of: a gradient may be the small rest of a difference."""

    def error(a: Tensor, b: Tensor, size: float) -> float:
        return float((a.double().cpu() - b).norm()) / size

    sigma = [float(s.abs()) for s in exact.sigma]
    roots = [prod(case.shapes[j]) ** 0.5 for j in case.layer_list]
    slack = [law.kind == AT_MOST and sigma[j] <= law.number for j, law in enumerate(case.law_list)]
    numbers = [law.number or 1.0 for law in case.law_list]
    sizes_by_layer = dict(zip(case.layer_list, roots, strict=True))
    grad_sizes = [size * (1 if slack[j] else numbers[j] / sigma[j]) for j, size in sizes_by_layer.items()]
    gain_sizes = [
        size * case.magnitude / sigma[j] for j, size in sizes_by_layer.items() if case.law_list[j].kind == GAIN
    ]
    sizes = {
        "normalized": [float(w.norm()) for w in exact.normalized],
        "vectors": [1.0] * len(exact.vectors),
        "sigma": sigma,
        "grad_weights": grad_sizes,
        "grad_gains": gain_sizes,
    }
    return {
        name: list(map(error, getattr(found, name), getattr(exact, name), sizes_of_kind))
        for name, sizes_of_kind in sizes.items()
    }


def vectors_in_long_double(case: Case, x: Inputs) -> list[Tensor]:
    """The new vectors, rounded to float64 once: the reference in float64 errs as much as the kernels that it judges.

    Where numpy's long double is no longer than float64 they are as good as the reference's.
    """
    found, rest = [], iter(x.vectors)
    for weight, dim, both in zip(x.weights, case.dim_list, case.two_sided, strict=True):
        own = [next(rest).numpy().astype(np.longdouble) for _ in range(4 if both else 2)]
        for _ in range(case.n_power_iterations):
            matrix = unfold(weight, dim).numpy().astype(np.longdouble)
            own[0] = unit_in_long_double(matrix @ own[1], case.eps)
            own[1] = unit_in_long_double(matrix.T @ own[0], case.eps)
            if both:
                matrix = unfold(weight, input_dimension(dim)).numpy().astype(np.longdouble)
                own[3] = unit_in_long_double(matrix.T @ own[2], case.eps)
                own[2] = unit_in_long_double(matrix @ own[3], case.eps)
        found += [torch.from_numpy(v.astype(np.float64)) for v in own]
    return found


def unit_in_long_double(x: np.ndarray, eps: float) -> np.ndarray:
    return x / max(np.sqrt((x * x).sum()), np.longdouble(eps))


@functools.lru_cache(maxsize=512)
def exact_and_bounds(case: Case) -> tuple[Results, dict[str, float]]:
    """The exact results, and the error that each kind may have."""
    x = inputs(case)
    exact = run("reference", case, in_dtype(x, torch.float64), torch.float64)
    rounding = torch.finfo(compute_dtype(case.weight_dtype)).eps
    if case.weight_dtype == torch.float64:
        exact.vectors = vectors_in_long_double(case, x)
        # What float32 loses, in units of its rounding, float64 may lose in its own.
        single, units = in_dtype(x, torch.float32), rounding / torch.finfo(torch.float32).eps
        truth = run("reference", case, in_dtype(single, torch.float64), torch.float64)
        plain = errors(run("reference", case, single, torch.float32), truth, case)
    else:
        plain, units = errors(run("reference", case, x), exact, case), 1.0
    bounds = {name: units * FACTOR * max(values, default=0.0) + FLOOR * rounding for name, values in plain.items()}
    for name, dtype in (("normalized", case.result_dtype), ("grad_weights", case.weight_dtype)):
        if dtype.itemsize == 2:
            bounds[name] = FACTOR_HALF * max(plain[name])
    return exact, bounds


def check(backend: str, case: Case, device: str = "cpu", more_units: int = 0) -> Results:
    """Compare a backend with the reference; return what the backend found.

    `more_units` of rounding are allowed beyond FLOOR, for sums so long that the reference's may be better by luck.
    """
    x = inputs(case, device)
    found = run(backend, case, x)
    for kept, vector in zip(found.snapshot, found.vectors, strict=True):
        assert same_bits(kept, vector), "the snapshot is not what the vectors are"
    if case.n_power_iterations == 0:
        for old, new in zip(x.vectors, found.vectors, strict=True):
            assert same_bits(old, new), "evaluation changed a vector"
    exact, bounds = exact_and_bounds(case)
    more = more_units * torch.finfo(compute_dtype(case.weight_dtype)).eps
    for name, values in errors(found, exact, case).items():
        for j, value in enumerate(values):
            allowed = bounds[name] + more
            assert value <= allowed, f"{name}[{j}]: error {value:.2e}, allowed {allowed:.2e}"  # NaN fails too
    return found


def check_slack(backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """A bound that is slack leaves weights and gradients as they are, and backward does not read the weights."""
    case = Case(shapes=((5, 3, 3, 3), (7, 40), (130, 33)), weight_dtype=dtype, result_dtype=dtype)
    x = inputs(case, device)
    batch, laws = Batch.of(x.weights, case.dim_list, case.two_sided), Laws.of([Law(AT_MOST, 1e6)] * 3)
    working = compute_dtype(dtype)
    snapshot = torch.empty(batch.snapshot_size, dtype=working, device=device)
    sigma = torch.empty(3, dtype=working, device=device)
    results, grads = ([torch.empty_like(w) for w in x.weights] for _ in range(2))
    ops.normalize(batch, x.weights, x.vectors, laws, case.eps, 1, results, snapshot, sigma, backend)
    assert all(map(same_bits, results, x.weights))
    for weight in x.weights:
        weight.fill_(torch.nan)
    ops.normalize_backward(batch, x.grads, x.weights, [0, 1, 2], laws, snapshot, sigma, grads, None, backend)
    assert all(map(same_bits, grads, x.grads))
