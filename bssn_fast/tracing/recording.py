"""Who records what runs, and what eager code and compiled code tell each other of a layer.

Imports nothing of torch's compiler, which takes long to load.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from threading import get_ident
from types import CodeType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.utils import parametrize

from bssn_fast.calls.serving import Entry, leads_to, serves, unless_frozen


def _is_exporting() -> bool:
    # What torch.compiler.is_exporting() returns; asked by name, torch 2.11's compiler takes the answer to be yes.
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    if flag is None:  # all that torch 2.6 tells of torch.export; it is silent in strict mode
        return torch.compiler.is_compiling() and not is_dynamo_compiling()
    return bool(flag)


def is_exporting() -> bool:
    """Whether torch.export, an ONNX exporter or torch.jit.trace records the model: they want plain operations."""
    return _is_exporting() or torch._C._get_tracing_state() is not None  # torch.jit.is_tracing is slow


IN_TRANSFORM = -2
"""In place of the version of a weight whose result was recorded in a transform of torch.func."""


class Traced:
    """What compiled code can know of a layer: it cannot look at versions, nor ask whether a call is still running.

    in_block: the layer is in a block of `bssn_fast.cached`.
    iterated: compiled code has had the block's power iteration, whose result is not kept.
    """

    __slots__ = ("in_block", "iterated")

    def __init__(self) -> None:
        self.in_block = self.iterated = False


def traced_result(norm: Any, weight: Tensor) -> Tensor | None:
    """Return what the model's call, eager or compiled, has normalised a layer's weight to."""
    for group, j in norm.slots:
        ready = _published(group, j, weight, norm.gain)
        if ready is not None:
            return ready
    return None


def recorded_result(norm: Any, weight: Tensor) -> Tensor | None:
    """Return what a compiled beginning of a call has left, for a layer of the model that is not compiled."""
    for group, j in norm.slots:
        if group.recorded and get_ident() not in group.calls:
            ready = _published(group, j, weight, norm.gain)
            if ready is not None:
                return ready
    return None


def _published(group: Any, j: int, weight: Tensor, gain: Tensor | None) -> Tensor | None:
    """Return what a group's call has of its j-th layer, if that is what is wanted of this weight now."""
    entry: Entry | None = None if group.published is None else group.published[j]
    if entry is None or entry[0] is not weight:
        return None
    ready = entry[2]
    if not serves(ready, weight) or (gain is not None and not leads_to(ready, gain)):
        return None
    # A compiler does not know that a weight requires a gradient by which a transform of torch.func differentiates.
    if group.recorded and entry[1] == IN_TRANSFORM:  # else it is a version, which changes from step to step
        return ready
    return unless_frozen(ready, weight, gain)


def has_iterated(norm: Any, weight: Tensor) -> bool:
    """Whether the model's call has had an iteration for a layer's weight."""
    published = [(group.published, j) for group, j in norm.slots]
    return any([p is not None and p[j] is not None and p[j][0] is weight for p, j in published])


def iterated_in_torchs_block(norm: object) -> bool:
    """Whether a layer has had its iteration in the `parametrize.cached` that is running."""
    return parametrize._cache_enabled > 0 and (id(norm), _ITERATED) in parametrize._cache


def note_in_torchs_block(norm: object) -> None:
    """Remember that a layer has had its iteration, in what torch throws away when `parametrize.cached` ends."""
    if parametrize._cache_enabled:
        parametrize._cache[id(norm), _ITERATED] = None


_ITERATED = "bssn_fast: iterated"

Function = TypeVar("Function", bound=Callable[..., Any])


def called_eagerly(function: Function) -> Function:
    """Have torch.compile leave a function alone where nothing that it compiles calls it.

    So it is with hooks of a compiled module, and with weights that are read after a graph break. torch would make a
    graph of the function, in which layers that are not used get gradients of zeros.
    """
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:  # torch 2.6
        return _without_compiler(function)
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function


def _without_compiler(function: Function) -> Function:
    """Return the function in a wrapper that switches the compiler off: torch 2.6 can only skip a function's own code.

    torch.compiler.disable would not do: compiled code cannot call what that returns.
    """
    frames: Any = torch._C._dynamo.eval_frame

    @functools.wraps(function)
    def eager(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return function(*args, **kwargs)
        compiler = frames.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            frames.set_eval_frame(compiler)

    wrapped = cast(Function, eager)
    frames.skip_code(wrapped.__code__)
    return wrapped


WRAPPER: CodeType = cast(Any, called_eagerly(lambda: None)).__code__
"""The code of `called_eagerly`'s wrapper, where it makes one, for those who look at the stack."""


class Share:  # a class: torch 2.6's compiler knows no generators that contextlib decorates
    """Begin and end a block of `bssn_fast.cached` that lies in compiled code."""

    def __init__(self, norms: Sequence[Any]) -> None:
        self.norms = norms
        self.outer: list[bool] = []

    def __enter__(self) -> None:
        self.outer = [norm.traced.in_block for norm in self.norms]
        for norm in self.norms:
            norm.traced.in_block = True

    def __exit__(self, *_: object) -> None:
        for norm, inside in zip(self.norms, self.outer, strict=True):
            norm.traced.in_block = inside
            norm.traced.iterated = norm.traced.iterated and inside
