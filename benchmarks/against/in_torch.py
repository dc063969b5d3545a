"""Spectral normalisation in torch operations, as users write it: what bssn_fast is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.work.layer_sets import Weights
from benchmarks.work.problem import EPS, Problem
from bssn_fast import reference
from bssn_fast.reference import unfold


@dataclass(frozen=True)
class Normalisation:
    """A call that returns the normalised weights, and a look at the vectors, for each weight its own."""

    run: Callable[[], Sequence[Tensor]]
    vectors: Callable[[], list[tuple[Tensor, ...]]]


def _rounded(vectors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return copies in the weights' dtype, which is that of the vectors of torch's own parametrization."""
    return tuple(v.to(dtype, copy=True) for v in vectors)


def torch_eager(problem: Problem) -> Normalisation:
    """torch's own parametrization for "sn"; for "bssn" the same thing for two directions."""
    model = problem.model()
    if problem.variant != "sn":
        return _parametrized(problem, model, BidirectionalNorm)
    for layer, vectors in zip(model.layers, problem.vectors, strict=True):
        spectral_norm(layer, eps=EPS)
        norm = layer.parametrizations.weight[0]
        with torch.no_grad():
            norm._u.copy_(vectors[0])
            norm._v.copy_(vectors[1])
    norms = [layer.parametrizations.weight[0] for layer in model.layers]
    return Normalisation(model, lambda: [(n._u, n._v) for n in norms])


_compiled: WeakSet[Problem] = WeakSet()


def torch_compiled(problem: Problem, mode: str | None) -> Normalisation:
    """All layers in one graph of torch.compile, with vectors that go in and come out.

    Parametrizations that write into buffers, torch's own among them, get wrong gradients in some layers when compiled
    (torch 2.13, CPU; a [64, 3, 1, 1] weight alone is off by 0.3 %): the compiled backward pass seems to repeat
    operations on buffers that have changed since.
    """
    if problem not in _compiled:  # in each mode once: what the other mode has compiled must stay
        torch._dynamo.reset()  # or the limit of recompilations makes the next model's code eager
        _compiled.add(problem)
    vectors = [_rounded(group, problem.dtype) for group in problem.vectors]

    @torch.compile(mode=mode, fullgraph=True)
    def normalize_all(
        weights: list[Tensor], vectors: list[tuple[Tensor, ...]]
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        layers = zip(weights, vectors, problem.dims, strict=True)
        results = [bidirectional(w, v, dim, problem.scale) for w, v, dim in layers]
        return [out for out, _ in results], [new for _, new in results]

    def run() -> list[Tensor]:
        nonlocal vectors
        if mode:  # a forward without a backward has ended too, and its graph may be replayed
            torch.compiler.cudagraph_mark_step_begin()
        outputs, new = normalize_all(problem.weights, vectors)
        # A CUDA graph writes its results to the same place each time.
        vectors = [tuple(v.clone() if mode else v for v in group) for group in new]
        return outputs

    return Normalisation(run, lambda: vectors)


def reference_loop(problem: Problem) -> Normalisation:
    """The definition, `bssn_fast.reference`, as a parametrization of each layer."""
    return _parametrized(problem, problem.model(), ReferenceNorm)


def _parametrized(problem: Problem, model: Weights, kind: type[_Vectors]) -> Normalisation:
    own = torch.float32 if kind is ReferenceNorm else problem.dtype
    norms = [
        parametrized(layer, kind(_rounded(vectors, own), dim, problem.scale))
        for layer, vectors, dim in zip(model.layers, problem.vectors, problem.dims, strict=True)
    ]
    return Normalisation(model, lambda: [n.vectors() for n in norms])


def parametrized(layer: nn.Module, norm: _Vectors) -> _Vectors:
    """Put a normalisation on a layer's weight and return it."""
    parametrize.register_parametrization(layer, "weight", norm, unsafe=True)
    return norm


class _Vectors(nn.Module):
    """Holds one layer's vectors, in buffers, with its settings."""

    def __init__(self, vectors: tuple[Tensor, ...], dim: int, scale: float) -> None:
        super().__init__()
        self.dim, self.scale, self.n_vectors = dim, scale, len(vectors)
        for j, vector in enumerate(vectors):
            self.register_buffer(f"_{j}", vector.clone())

    def vectors(self) -> tuple[Tensor, ...]:
        return tuple(self.get_buffer(f"_{j}") for j in range(self.n_vectors))


class BidirectionalNorm(_Vectors):
    """Both directions' spectral norms as a parametrization, as torch's `spectral_norm` is one for one direction."""

    def forward(self, weight: Tensor) -> Tensor:
        old = self.vectors()
        out, new = bidirectional(weight, old, self.dim, self.scale)
        for vector, value in zip(old, new, strict=True):
            vector.copy_(value)
        return out


def bidirectional(weight: Tensor, vectors: Sequence[Tensor], dim: int, scale: float) -> tuple[Tensor, list[Tensor]]:
    """Return a normalised weight and its new vectors; one direction where two vectors are given."""
    new = list(vectors)
    matrix, across = unfold(weight, dim), unfold(weight, 1 - dim)
    with torch.no_grad():
        new[0] = normalize(torch.mv(matrix, new[1]), dim=0, eps=EPS)
        new[1] = normalize(torch.mv(matrix.T, new[0]), dim=0, eps=EPS)
        if len(new) == 4:
            new[3] = normalize(torch.mv(across.T, new[2]), dim=0, eps=EPS)
            new[2] = normalize(torch.mv(across, new[3]), dim=0, eps=EPS)
    sigma = torch.vdot(new[0], torch.mv(matrix, new[1]))
    if len(new) == 4:
        sigma = (sigma + torch.vdot(new[2], torch.mv(across, new[3]))) / 2
    return weight * (scale / sigma), new


class ReferenceNorm(_Vectors):
    """`bssn_fast.reference.normalize` with vectors that persist."""

    def forward(self, weight: Tensor) -> Tensor:
        old = self.vectors()
        out, new, _ = reference.normalize(weight, old, self.dim, scale=self.scale, eps=EPS, n_power_iterations=1)
        for vector, value in zip(old, new, strict=True):
            vector.copy_(value)
        return out


class ForeachNorm(nn.Module):
    """All layers at once where torch has an operation for lists of tensors: lengths, divisions and products."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.weights = nn.ParameterList(problem.weights)
        self.dims, self.scale = problem.dims, problem.scale
        self.vectors = [_rounded(vectors, problem.dtype) for vectors in problem.vectors]
        self.shared = [j for j, two in enumerate(problem.two_sided) if two]

    def forward(self) -> list[Tensor]:
        weights = list(self.weights)
        both = [weights[j] for j in self.shared]
        matrices = [unfold(w, d) for w, d in zip(weights, self.dims, strict=True)]
        across = [unfold(w, 1 - self.dims[j]) for j, w in zip(self.shared, both, strict=True)]
        # The first and second vector to update, of the out side of all layers and the in side of those that have one.
        first = [v[0] for v in self.vectors] + [self.vectors[j][3] for j in self.shared]
        second = [v[1] for v in self.vectors] + [self.vectors[j][2] for j in self.shared]
        maps = matrices + [m.T for m in across]
        with torch.no_grad():
            _update(first, [m @ v for m, v in zip(maps, second, strict=True)])
            _update(second, [m.T @ u for m, u in zip(maps, first, strict=True)])
            # torch saves vectors for the backward pass: the next forward must not change those.
            left, right = [v.clone() for v in first], [v.clone() for v in second]
        sigmas = [torch.dot(u, m @ v) for u, m, v in zip(left, maps, right, strict=True)]
        for j, other in zip(self.shared, sigmas[len(weights) :], strict=True):
            sigmas[j] = (sigmas[j] + other) / 2
        factors = torch._foreach_mul(torch._foreach_reciprocal(sigmas[: len(weights)]), self.scale)
        return torch._foreach_mul(weights, factors)


def _update(vectors: list[Tensor], new: list[Tensor]) -> None:
    """Set vectors to the unit vectors along `new`."""
    lengths = torch._foreach_norm(new)
    torch._foreach_clamp_min_(lengths, EPS)
    torch._foreach_div_(new, lengths)
    torch._foreach_copy_(vectors, new)


def foreach(problem: Problem) -> Normalisation:
    """One module for all layers, with torch._foreach_ operations."""
    module = ForeachNorm(problem)
    return Normalisation(module, lambda: module.vectors)
