"""torch.utils.checkpoint repeats forwards in the backward pass: they must use the vectors that they had before.

Which forward is repeated is told by the object that torch keeps for each checkpoint: it is the same one then. With it
lie the vectors that each layer had in there, in the order in which they were asked for, as long as a graph may repeat
it. The same goes for any torch.autograd.Function whose backward calls what its forward called, as reversible blocks and
adjoint solvers do: its `ctx` is the same object in both.
"""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.compiler import is_dynamo_compiling

from bssn_fast import ops
from bssn_fast.calls import hooks

Vectors = tuple[Tensor, ...]


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return not is_dynamo_compiling() and torch._C._current_graph_task_id() != -1


def maybe_in_checkpoint() -> bool:
    """Whether a checkpoint may be around the code that is running; quick, and right when it says no."""
    return not torch.is_grad_enabled() or hooks.innermost() is not None


class _Around(NamedTuple):
    """The checkpoints around the code that is running."""

    first_time: list[Any]  # they may repeat it later
    repeating: Any  # the innermost one that repeats it now, or None
    in_order: bool = True


class _Record:
    """The vectors that each layer had in the forward of one checkpoint.

    By the layer and by who asked: a call of the model, or a reader of the weight alone. In compiled code, which knows
    no layers, by the weights' shapes.
    """

    def __init__(self) -> None:
        self.vectors: dict[object, list[Vectors]] = {}
        self._positions: dict[object, int] = {}
        self._pass = -1

    def next(self, key: object) -> Vectors | None:
        """Return what a layer had at this point of the forward; None if it was not asked for there."""
        this_pass = torch._C._current_graph_task_id()
        if self._pass != this_pass:
            self._pass, self._positions = this_pass, {}
        found = self.vectors.get(key)
        if not found:
            return None
        position = self._positions.get(key, 0)
        self._positions[key] = position + 1
        return found[min(position, len(found) - 1)]

    def only(self, key: object) -> Vectors | None:
        """Return what a layer had in the whole forward; None if it was not asked for, or had several in turn."""
        found = self.vectors.get(key)
        if not found or any([v.data_ptr() for v in w] != [v.data_ptr() for v in found[0]] for w in found):
            return None
        return found[0]


_records: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()


def note(norm: object, vectors: Callable[[], Vectors], *, in_call: bool) -> None:
    """Remember, in a checkpoint's forward, the vectors that a layer is normalised with.

    in_call: when a call of the model begins, and not when the weight is read.
    """
    _note((id(norm), in_call), vectors)


def _note(key: object, vectors: Callable[[], Vectors]) -> None:
    for checkpoint in _around().first_time:
        record = _records.get(checkpoint)
        if record is None:
            record = _records.setdefault(checkpoint, _Record())
        record.vectors.setdefault(key, []).append(vectors())


def recall(norm: object, *, in_call: bool) -> Vectors | None:
    """Return the vectors that a layer had in the forward that is being repeated; None if that is not known.

    A checkpoint repeats its forward in order. Of other functions nobody knows in what order they go back, as adjoint
    solvers do in the other one: there the vectors are known only where all the forward had the same.
    """
    return _recall(_around(), (id(norm), in_call))


def _recall(around: _Around, key: object) -> Vectors | None:
    record = None if around.repeating is None else _records.get(around.repeating)
    if record is None:
        return None
    return (record.next if around.in_order else record.only)(key)


def _recall_compiled(key: object, iterates: bool) -> Vectors | None:
    """Return what `ops.Checkpoints` says.

    What compiled code runs in a backward pass need not be a repetition: its own backward graph may hold the operation.
    """
    if not in_backward():
        return None
    around = _around()
    if around.repeating is None:
        return None
    known = _recall(around, key)
    if known is None and not iterates:
        return None
    if known is None:
        warnings.warn(
            "bssn_fast: torch.utils.checkpoint repeats a compiled part of a model whose layers were normalised outside "
            "of the checkpoint. It uses the vectors as they are now, which are those of the latest forward. With "
            "update='access' it uses those of its own forward",
            stacklevel=2,
        )
    return known or ()


def _note_compiled(key: object, vectors: Callable[[], Vectors]) -> None:
    if maybe_in_checkpoint():
        _note(key, vectors)


ops.checkpoints = ops.Checkpoints(_recall_compiled, _note_compiled)


def _code(function: Any) -> CodeType:
    return inspect.unwrap(function).__code__


_FILE = _code(torch_checkpoint.checkpoint).co_filename
_FORWARD = _code(torch_checkpoint.CheckpointFunction.forward)
_BACKWARD = _code(torch_checkpoint.CheckpointFunction.backward)


def _around() -> _Around:
    """Find the checkpoints on the stack, the innermost first."""
    first_time = [*_of_hooks()]
    for frame in _frames():
        code = frame.f_code
        if code is _BACKWARD:
            return _Around(first_time, frame.f_locals.get("ctx"))
        if code.co_name == "unpack_hook" and code.co_filename == _FILE:
            return _Around(first_time, frame.f_locals.get("frame"))
        found = None
        if code is _FORWARD:
            found = frame.f_locals.get("ctx")
        elif code.co_filename == _FILE and "gen" in code.co_varnames:  # `checkpoint`, or what it calls since torch 2.14
            generator = getattr(frame.f_locals.get("gen"), "gi_frame", None)
            found = None if generator is None else generator.f_locals.get("new_frame")
        elif code.co_varnames[:1] == ("ctx",):
            found = frame.f_locals.get("ctx")
            if not isinstance(found, FunctionCtx):
                found = None
            elif code.co_name != "forward":
                if found in _records:
                    return _Around(first_time, found, in_order=False)
                found = None
        if found is not None and all(found is not other for other in first_time):
            first_time.append(found)
    return _Around(first_time, None)


def _of_hooks() -> Iterator[Any]:
    """Yield the checkpoint whose hooks see what is saved now: also one that is no function on the stack.

    `torch.distributed._composable.checkpoint` works by hooks of modules.
    """
    found = hooks.innermost()
    pack: Any = found[0] if found else None
    code = getattr(pack, "__code__", None)
    if code is not None and code.co_filename == _FILE and "frame" in code.co_freevars:
        yield pack.__closure__[code.co_freevars.index("frame")].cell_contents


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back
