"""Who records what runs, and what eager code and compiled code tell each other of a layer.

Imports nothing of torch's compiler, which takes long to load.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling


def _is_exporting() -> bool:
    # What torch.compiler.is_exporting() returns; asked by name, torch 2.11's compiler takes the answer to be yes.
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    if flag is None:  # all that torch 2.6 tells of torch.export; it is silent in strict mode
        return torch.compiler.is_compiling() and not is_dynamo_compiling()
    return bool(flag)


def is_exporting() -> bool:
    """Whether torch.export, an ONNX exporter or torch.jit.trace records the model: they want plain operations."""
    return _is_exporting() or torch._C._get_tracing_state() is not None  # torch.jit.is_tracing is slow


class Traced:
    """What compiled code can know of a layer: it cannot look at versions, nor ask whether a call is still running.

    in_block: the layer is in a block of `bssn_fast.cached`.
    iterated: compiled code has had the block's power iteration, whose result is not kept.
    """

    __slots__ = ("in_block", "iterated")

    def __init__(self) -> None:
        self.in_block = self.iterated = False


def traced_result(norm: Any) -> Tensor | None:
    """Return what the model's call, eager or compiled, has normalised a layer's weight to."""
    for group, j in norm.slots:
        published = group.published
        if published is not None:
            ready: Tensor | None = published[j]
            if ready is not None:
                return ready
    return None


def call_eagerly(*functions: Callable[..., Any]) -> None:
    """Have torch.compile leave functions alone where nothing that it compiles calls them.

    So it is with hooks of a compiled module, and with weights that are read after a graph break. torch would make a
    graph of each function, in which layers that are not used get gradients of zeros. That is what happens with versions
    of torch that do not have what is asked for here.
    """
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:
        return
    for function in functions:
        set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


@contextlib.contextmanager
def share(norms: Sequence[Any]) -> Iterator[None]:
    """Begin and end a block of `bssn_fast.cached` that lies in compiled code."""
    outer = [norm.traced.in_block for norm in norms]
    for norm in norms:
        norm.traced.in_block = True
    try:
        yield
    finally:
        for norm, inside in zip(norms, outer, strict=True):
            norm.traced.in_block = inside
            norm.traced.iterated = norm.traced.iterated and inside
