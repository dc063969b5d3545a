"""One call of a model, and what its layers get in it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from gc import get_referents
from threading import get_ident
from types import FrameType
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from bssn_fast.calls.composite import wants_plain_operations
from bssn_fast.calls.contents import contents_of, version
from bssn_fast.calls.plan import Plans, Results
from bssn_fast.calls.serving import Entry, is_same, leads_to, serves, unless_frozen
from bssn_fast.layout import has_its_memory
from bssn_fast.modules import recomputation
from bssn_fast.modules.advice import Advice
from bssn_fast.tracing.recording import WRAPPER, called_eagerly

_CALL = nn.Module._call_impl.__code__


def frame_of_call() -> FrameType:
    """Return the frame of the module call whose hook has called the caller."""
    frame = sys._getframe(2)
    if frame.f_code is WRAPPER and frame.f_back is not None:
        frame = frame.f_back
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


def interrupts(frame: FrameType, outer: FrameType) -> bool:
    """Whether a frame runs in the middle of what an outer frame runs, without having been called from there.

    Signal handlers, debuggers and tracing functions begin at any instruction. To each of them Python passes the frame
    that it has interrupted, which is then both the next frame on the stack and one of the arguments. A stack without
    the outer frame is another one in the same thread, as of a greenlet.
    """
    inner: FrameType | None = frame
    while inner is not outer:
        if inner is None:
            return True
        below = inner.f_back
        for value in _arguments(inner):
            if value is below or (type(value) is tuple and any(v is below for v in value)):
                return True
        inner = below
    return False


def _arguments(frame: FrameType) -> list[Any]:
    code, values = frame.f_code, frame.f_locals
    n = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    return [values.get(name) for name in code.co_varnames[:n]]


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
        "aside",
        "children",
        "doubted",
        "entries",
        "frame",
        "gains",
        "grad_enabled",
        "inherited",
        "measured",
        "others",
        "reads",
        "sources",
    )

    def __init__(self, frame: FrameType, layers: int, aside: Sequence[tuple[Any, Call]] = ()) -> None:
        self.frame = frame
        self.aside = aside  # calls, of groups, that this one has interrupted and that go on afterwards
        self.grad_enabled = torch.is_grad_enabled()
        self.entries: list[Entry | None] = [None] * layers
        self.sources: list[tuple[list[int], Results]] = []  # of the layers with these indices
        self.gains: dict[int, tuple[Tensor, int]] = {}  # of the layers that have one, with its version
        self.others: dict[int, Source | None] = {}  # of single layers
        self.doubted: dict[int, bytes | Tensor] = {}  # what a weight was when somebody looked at its layer
        self.inherited = False  # the frame is that of another call, which goes on
        self.measured: Any = None  # of layers whose weights submodules will gather: see `shards`
        self.children: list[Any] = []  # groups whose calls end with this one
        self.reads: set[object] | None = None  # counted in a model's first calls

    def running(self) -> bool:
        """Whether the model's call has not ended yet."""
        if not get_referents(self.frame):
            return True  # CPython, from 3.11, shows nothing of a running frame; quicker than the exception below
        try:
            self.frame.clear()  # an ended call's: its inputs are not kept alive either
        except RuntimeError:  # what is running cannot be cleared
            return True
        return False

    def bring_back(self, thread: int) -> None:
        """After this call: let the calls that it has interrupted go on."""
        for group, call in self.aside:
            group.calls[thread] = call
            group.published, group.recorded = call.entries, False

    def put(self, indices: Iterable[int], weights: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """Make results those of the layers with these indices."""
        for j, weight, result in zip(indices, weights, results, strict=True):
            try:
                self.entries[j] = weight, weight._version, result, result._version
            except RuntimeError:  # one of them keeps no version
                self.entries[j] = weight, version(weight), result, version(result)

    def put_gains(self, indices: Iterable[int], gains: Iterable[Tensor | None]) -> None:
        """Note with which gains the results of the layers with these indices were made."""
        self.gains.update({j: (g, version(g)) for j, g in zip(indices, gains, strict=True) if g is not None})

    @called_eagerly
    def find(self, j: int, weight: Tensor, reader: object = None) -> Tensor | None:
        """Return the j-th layer's result if it is that of this weight as it is now, with a graph if one is wanted.

        reader: the layer's parametrization, for code inside the call; a checkpoint around that code hears of it.
        """
        entry = self.entries[j]
        if entry is None:
            return None
        owner, owner_version, ready, ready_version = entry
        if owner is not weight or not serves(ready, weight):
            return None
        try:
            same = owner_version == weight._version and ready_version == ready._version
        except RuntimeError:  # one of them keeps no version
            same = owner_version == version(weight) and ready_version == version(ready)
        if not same or (get_referents(self.frame) and not self.running()):
            return None
        if self.doubted and self._written(j, weight):
            self.entries[j] = None
            return None
        if self.gains and j in self.gains:
            gain, before = self.gains[j]
            if version(gain) != before or not leads_to(ready, gain):
                return None
            if reader is not None and cast(Any, reader).gain is not gain:  # as in a functional_call inside
                return None
        if reader is not None and recomputation.maybe_in_checkpoint():
            source = self.source(j)
            if source is not None and (self.grad_enabled or torch.is_grad_enabled()):  # else no graph will repeat it
                recomputation.note(reader, source.vectors, in_call=False)
        if weight.requires_grad:  # quicker than to ask
            return ready
        return unless_frozen(ready, weight, self.gains[j][0] if j in self.gains else None)

    def doubt(self, j: int) -> None:
        """Let the next `find` look at all elements: somebody has got at the weight, and torch may count no version.

        Such as a model that masks its weights in its own forward, by `weight.data *= mask`.
        """
        entry = self.entries[j]
        if entry is not None and j not in self.doubted and not wants_plain_operations(entry[:1]) and self.running():
            weight = entry[0]
            if has_its_memory(weight):
                self.doubted[j] = contents_of([weight]) or weight.detach().clone()  # on a GPU there is no hash
            else:  # whoever reads it is told so
                self.entries[j] = None

    def _written(self, j: int, weight: Tensor) -> bool:
        """Whether a weight has changed since somebody looked at its layer; asked once."""
        before = self.doubted.pop(j, None)
        if before is None:
            return False
        if not has_its_memory(weight):
            return True
        if isinstance(before, Tensor):
            return not torch.equal(before, weight.detach())
        return contents_of([weight]) != before

    def stands_in(self, j: int, weight: Tensor) -> bool:
        """Whether another weight is in the place of the one that the call has normalised."""
        entry = self.entries[j]
        return entry is not None and not is_same(weight, entry[0]) and self.running()

    def source(self, j: int) -> Source | None:
        """Return where the j-th layer's result comes from, if that is known."""
        for indices, results in self.sources:
            if j in indices:
                return Source(results, indices.index(j))
        return self.others.get(j)

    def iterated(self, j: int, weight: Tensor) -> bool:
        """Whether the layer's vectors have had their iteration for this weight in this call."""
        entry = self.entries[j]
        return entry is not None and is_same(weight, entry[0]) and entry[1] == version(weight)


@dataclass
class Chosen:
    """Layers that are to be normalised in a call, by their indices in the group."""

    indices: list[int]
    members: list[Any]
    weights: list[Tensor]
    iterating: list[bool]
    planned: Plans  # the plans of the moment; another thread, or a signal handler, may replace the group's
    readable: bool  # by kernels, as the guard of these plans says
    vectors: list[Sequence[Tensor] | None] | None = None  # those of a forward that is repeated


class Caller(Protocol):
    """Who normalises layers in calls of a model, as its layers see it; `group.Group` is the one there is.

    calls: the running call of each thread, by the thread's number.
    published: what the latest call has of its layers, for compiled code.
    recorded: they are those of a call whose beginning was compiled.
    shared: whether another group has some of the layers too.
    """

    calls: dict[int, Call]
    published: list[Entry | None] | None
    recorded: bool
    members: list[Any]
    shared: bool
    advice: Advice

    def __init__(self, layers: Iterable[ParametrizationList]) -> None: ...

    def layers(self) -> list[ParametrizationList]: ...

    def discard(self, norms: Iterable[Any]) -> None: ...


def interrupted(groups: Iterable[Caller], frame: FrameType) -> list[tuple[Caller, Call]]:
    """Return the running calls, of groups of the same layers, in the middle of which a signal handler calls the model.

    Such a call normalises for itself: its backward pass would free the graph of theirs.
    """
    found = [(group, group.calls.get(get_ident())) for group in groups]
    return [(g, c) for g, c in found if c is not None and c.running() and interrupts(frame, c.frame)]
