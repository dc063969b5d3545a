"""Everything that is timed against each other, by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import bssn_fast
from benchmarks.against import in_torch
from benchmarks.against.in_torch import Normalisation
from benchmarks.work.captured import capture
from benchmarks.work.devices import is_gpu
from benchmarks.work.problem import EPS, Problem
from bssn_fast import backends

COPY = "copy"
TORCH = "torch"
COMPILE = "torch.compile"
REDUCE_OVERHEAD = "torch.compile reduce-overhead"  # CUDA graphs: on a CPU the same as the default mode
REFERENCE = "reference"
OURS = "bssn_fast"


class Peer:
    """Computes a problem in stages: `forward` keeps its outputs, `backward` uses them, `release` lets go of both."""

    stages: tuple[str, ...] = ("forward", "backward")
    prepare_seconds: float | None = None  # what it took until the first results were there
    peak_megabytes: float | None = None  # memory of one forward and backward beyond what there was before

    def __init__(self, problem: Problem, normalisation: Normalisation) -> None:
        self._problem, self._normalisation = problem, normalisation
        self.outputs: Sequence[Tensor] | None = None
        self.gradients: Sequence[Tensor] | None = None

    def forward(self) -> None:
        self.outputs = self._normalisation.run()

    def backward(self) -> None:
        self.gradients = torch.autograd.grad(self.outputs, self._problem.weights, self._problem.grads)

    def release(self) -> None:
        self.outputs = self.gradients = None

    def first_run(self) -> None:
        """Run every stage once, with nothing allocated before."""
        for stage in self.stages:
            getattr(self, stage)()

    def check(self, name: str) -> None:
        """Raise WrongResultError if the first run gave anything but the right results."""
        self._problem.check(name, list(self.outputs or ()), self._normalisation.vectors(), list(self.gradients or ()))
        self.release()


class CopyPeer(Peer):
    """The plain copy of the weights' bytes into memory that is there already: the physical yardstick."""

    stages = ("forward",)

    def __init__(self, problem: Problem) -> None:
        size = sum(w.numel() for w in problem.weights)
        self._source = torch.ones(size, dtype=problem.weights[0].dtype, device=problem.device)
        self._target = torch.zeros_like(self._source)

    def forward(self) -> None:
        self._target.copy_(self._source)

    def release(self) -> None:
        pass

    def check(self, name: str) -> None:
        assert torch.equal(self._source, self._target)


class GraphPeer(Peer):
    """Another peer's two stages, each captured in a CUDA graph and replayed."""

    def __init__(self, problem: Problem, normalisation: Normalisation) -> None:
        super().__init__(problem, normalisation)
        kept = [tuple(v.clone() for v in vectors) for vectors in normalisation.vectors()]
        self._forward, self._backward = capture([super().forward, super().backward], self.release)
        self._static = self.outputs, self.gradients
        with torch.no_grad():
            for vectors, old in zip(normalisation.vectors(), kept, strict=True):
                for vector, value in zip(vectors, old, strict=True):
                    vector.copy_(value)

    def forward(self) -> None:
        self._forward.replay()
        self.outputs = self._static[0]

    def backward(self) -> None:
        self._backward.replay()
        self.gradients = self._static[1]


class WayPeer(Peer):
    """Ours in a way that an environment variable chooses."""

    def __init__(self, problem: Problem, normalisation: Normalisation, backend: str, way: str) -> None:
        super().__init__(problem, normalisation)
        self._variable, self._value = variable_of(backend, way)

    def forward(self) -> None:
        with self._chosen():
            super().forward()

    def backward(self) -> None:
        with self._chosen():
            super().backward()

    @contextmanager
    def _chosen(self) -> Iterator[None]:
        """Set the environment variable, by hand: `patch.dict` copies all of them, which takes the host's time."""
        was = os.environ.get(self._variable)
        os.environ[self._variable] = self._value
        try:
            yield
        finally:
            if was is None:
                del os.environ[self._variable]
            else:
                os.environ[self._variable] = was


def _ours(problem: Problem, backend: str) -> Normalisation:
    model: nn.Module = problem.model()
    scale = None if problem.variant == "sn" else problem.scale
    bssn_fast.apply(model, problem.variant, scale=scale, eps=EPS, backend=backend)
    norms = [layer.parametrizations.weight[0] for layer in model.layers]

    def vectors() -> list[tuple[Tensor, ...]]:
        return [tuple(norm.get_buffer(name) for name in norm.vector_names) for norm in norms]

    with torch.no_grad():
        model.eval()()  # vectors are looked at before the first call, and arbitrary ones would be replaced
        model.train()
        for mine, given in zip(vectors(), problem.vectors, strict=True):
            for vector, value in zip(mine, given, strict=True):
                vector.copy_(value)
    return Normalisation(model, vectors)


_ANYWHERE: dict[str, Callable[[Problem], Peer]] = {
    COPY: CopyPeer,
    TORCH: lambda problem: Peer(problem, in_torch.torch_eager(problem)),
    COMPILE: lambda problem: Peer(problem, in_torch.torch_compiled(problem, None)),
    "foreach": lambda problem: Peer(problem, in_torch.foreach(problem)),
    REFERENCE: lambda problem: Peer(problem, in_torch.reference_loop(problem)),
}
_ON_CUDA: dict[str, Callable[[Problem], Peer]] = {
    REDUCE_OVERHEAD: lambda problem: Peer(problem, in_torch.torch_compiled(problem, "reduce-overhead")),
    "torch graph": lambda problem: GraphPeer(problem, in_torch.torch_eager(problem)),
}
COMPILED = (COMPILE, REDUCE_OVERHEAD)
PLANS = {"cuda": ("clusters", "keep"), "triton": ("registers",)}
"""Of a backend: what `BSSN_FAST_<backend>_PLAN` can choose besides the default."""


def our_ways(backend: str) -> tuple[str, ...]:
    """Return the ways of calling a backend on a GPU.

    One launch each way, one for each phase, one captured in a CUDA graph, and plans that are not the default.
    """
    return ("", " phases", " graph", *(f" {plan}" for plan in PLANS.get(backend, ())))


def variable_of(backend: str, way: str) -> tuple[str, str]:
    """Return the environment variable that chooses a way of launching, or a plan, and its value."""
    what = "PLAN" if way in PLANS.get(backend, ()) else "LAUNCH"
    return f"BSSN_FAST_{backend.upper()}_{what}", way


def names(device: torch.device | str = "cpu") -> list[str]:
    """Return the peers there are for a device; ours, with its backend in the name, come last."""
    kind = torch.device(device).type
    default = backends.default(kind)
    mine = [b for b in backends.NAMES if b != "reference" and backends.why_unavailable(b, kind) is None]
    mine.sort(key=lambda name: name != default)
    found = [*_ANYWHERE, *(_ON_CUDA if is_gpu(device) else ())]
    for backend in mine:
        found += [f"{OURS} {backend}{way}" for way in (our_ways(backend) if is_gpu(device) else ("",))]
    return found


def make(name: str, problem: Problem) -> Peer:
    """Return a peer that is ready for its first run; building some of them takes seconds."""
    if name in _ANYWHERE:
        return _ANYWHERE[name](problem)
    if name in _ON_CUDA:
        return _ON_CUDA[name](problem)
    _, backend, *way = name.split()
    normalisation = _ours(problem, backend)
    if way == ["graph"]:
        return GraphPeer(problem, normalisation)
    return WayPeer(problem, normalisation, backend, way[0]) if way else Peer(problem, normalisation)
