"""Raises an exception at one line after another of the package's own files."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import bssn_fast

OWN = str(Path(bssn_fast.__file__).parent)


@functools.cache
def _ends_of_blocks(code: CodeType) -> frozenset[int]:
    """Where a `with` block has ended and `__exit__` is not called yet.

    Python takes care that nothing is raised there: it looks for signals after calls only.
    """
    found: set[int] = set()
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "NOP")]
    for j, step in enumerate(steps[:-3]):
        loads = [
            i for i in steps[j : j + 3] if i.opname == "DUP_TOP" or (i.opname == "LOAD_CONST" and i.argval is None)
        ]
        if len(loads) == 3 and step.opname == "LOAD_CONST":
            before = steps[j - 1] if j and steps[j - 1].opname in ("SWAP", "ROT_TWO") else step
            found |= {i.offset for i in [before, *steps[j : j + 5]]}
    return frozenset(found)


def _runs(frame: FrameType | None, code: CodeType) -> bool:
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


class Trace:
    """Counts the lines (or bytecodes) of the package's files that run, and raises at one of them."""

    def __init__(
        self, at: int | None, error: type[BaseException], opcodes: bool, within: CodeType | None = None
    ) -> None:
        self.at, self.error, self.opcodes, self.within = at, error, opcodes, within
        self.count = 0
        self.where = ""

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(OWN):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = not self.opcodes, self.opcodes
        return self.local

    def local(self, frame: FrameType, event: str, arg: object) -> Any:
        if self.within is not None and not _runs(frame, self.within):
            return self.local
        if event != ("opcode" if self.opcodes else "line") or frame.f_lasti in _ends_of_blocks(frame.f_code):
            return self.local
        if self.count == self.at:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
            sys.settrace(None)
            raise self.error("as if at any moment")
        self.count += 1
        return self.local

    def run(self, action: Callable[[], object]) -> bool:
        """Run the action; return whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            action()
        except self.error:
            return True
        finally:
            sys.settrace(before)
        return False


def moments(
    prepare: Callable[[], Any],
    action: Callable[[Any], object],
    error: type[BaseException],
    *,
    most: float,
    opcodes: bool = False,
    within: CodeType | None = None,
) -> Iterator[tuple[Any, str]]:
    """Yield, for moments of an action in turn, what was prepared for it and where it was interrupted there.

    most: so many moments are tried, at equal distances.
    within: only while this function runs.
    """
    count = Trace(None, error, opcodes, within)
    ready = prepare()
    count.run(lambda: action(ready))
    step = max(1.0, count.count / most)
    assert count.count, "nothing of the package has run"
    for k in itertools.count():
        at = int(k * step)
        if at >= count.count:
            return
        ready, trace = prepare(), Trace(at, error, opcodes, within)
        if trace.run(lambda ready=ready: action(ready)):
            yield ready, trace.where
        # Otherwise it was less than before, or the exception was swallowed, which is none of ours to raise again.
