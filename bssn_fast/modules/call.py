"""One call of a model, and what its layers get in it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bssn_fast.calls.contents import version
from bssn_fast.calls.plan import Results
from bssn_fast.layout import result_dtype
from bssn_fast.modules import recomputation

_CALL = nn.Module._call_impl.__code__


def frame_of_call() -> FrameType:
    """Return the frame of the module call whose hook has called the caller."""
    frame = sys._getframe(2)
    outer = frame.f_back
    return outer if frame.f_code is not _CALL and outer is not None and outer.f_code is _CALL else frame


def in_module_call() -> bool:
    """Whether any module is being called, somewhere on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            return True
        frame = frame.f_back
    return False


class Source(NamedTuple):
    """Where a result comes from."""

    results: Results
    position: int

    def vectors(self) -> tuple[Tensor, ...]:
        """Return the vectors that the weight was normalised with."""
        return self.results.vectors(self.position)


class Call:
    """What a model's layers were normalised to for one call, by their index in the group.

    Results hold until the call ends. `end` does not hear of a call that KeyboardInterrupt has ended: so it counts as
    running only while its frame does.
    """

    __slots__ = (
        "children",
        "frame",
        "grad_enabled",
        "inherited",
        "others",
        "reads",
        "results",
        "sources",
        "versions",
        "weights",
    )

    def __init__(self, frame: FrameType, layers: int) -> None:
        self.frame = frame
        self.grad_enabled = torch.is_grad_enabled()
        self.weights: list[Tensor | None] = [None] * layers
        self.results: list[Tensor | None] = [None] * layers
        self.versions = [(0, 0)] * layers  # of weights and results
        self.sources: list[tuple[list[int], Results]] = []  # of the layers with these indices
        self.others: dict[int, Source | None] = {}  # of single layers
        self.inherited = False  # the frame is that of another call, which goes on
        self.children: list[Any] = []  # groups whose calls end with this one
        self.reads: set[tuple[int, str]] | None = None  # counted in a model's first calls

    def running(self) -> bool:
        """Whether the model's call has not ended yet."""
        try:
            self.frame.clear()  # an ended call's: its inputs are not kept alive either
        except RuntimeError:  # what is running cannot be cleared
            return True
        return False

    def put(self, indices: Sequence[int], weights: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Make results those of the layers with these indices."""
        try:
            versions = [(w._version, r._version) for w, r in zip(weights, results, strict=True)]
        except RuntimeError:  # one of them keeps no version
            versions = [(version(w), version(r)) for w, r in zip(weights, results, strict=True)]
        for j, weight, result, both in zip(indices, weights, results, versions, strict=True):
            self.weights[j], self.results[j], self.versions[j] = weight, result, both

    def find(self, j: int, weight: Tensor) -> Tensor | None:
        """Return the j-th layer's result if it is that of this weight as it is now, with a graph if one is wanted."""
        ready = self.results[j]
        if ready is None or self.weights[j] is not weight:
            return None
        try:
            same = self.versions[j] == (weight._version, ready._version)
        except RuntimeError:  # one of them keeps no version
            same = self.versions[j] == (version(weight), version(ready))
        return ready if same and serves(ready, weight) and self.running() else None

    def source(self, j: int) -> Source | None:
        """Return where the j-th layer's result comes from, if that is known."""
        for indices, results in self.sources:
            if j in indices:
                return Source(results, indices.index(j))
        return self.others.get(j)

    def iterated(self, j: int, weight: Tensor) -> bool:
        """Whether the layer's vectors have had their iteration for this weight in this call."""
        return self.results[j] is not None and self.weights[j] is weight and self.versions[j][0] == version(weight)

    def note_read(self, j: int, norm: object) -> None:
        """Let the checkpoint around the reading code, inside this call, know the layer's vectors."""
        source = self.source(j)
        if source is not None and (self.grad_enabled or torch.is_grad_enabled()):  # else no graph will repeat it
            recomputation.note(norm, source.vectors, in_call=False)


def serves(ready: Tensor, weight: Tensor) -> bool:
    """Whether a result has a graph if one is wanted now, and the dtype that is."""
    return (ready.requires_grad or not weight.requires_grad or not torch.is_grad_enabled()) and (
        # What was made for autocast is of no use where a model switches autocast off.
        ready.dtype == weight.dtype or ready.dtype == result_dtype(weight, True)
    )


class Caller(Protocol):
    """Who normalises layers in calls of a model, as its layers see it; `group.Group` is the one there is.

    calls: the running call of each thread, by the thread's number.
    published: the latest call's results, for compiled code.
    recorded: they are those of a call whose beginning was compiled.
    """

    calls: dict[int, Call]
    published: list[Tensor | None] | None
    recorded: bool

    def discard(self, norms: Iterable[Any]) -> None: ...

    def count_read(self, call: Call, module: nn.Module, tensor_name: str) -> None: ...

    def count_alone(self) -> None: ...

    def count_unknown(self) -> None: ...
