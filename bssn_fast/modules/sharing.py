"""Blocks in which all calls share one normalisation: `bssn_fast.cached` and torch's `parametrize.cached`.

A block ends with the `with` statement that began it, also where an interrupt keeps its last lines from running: what is
asked is whether that statement is still running, and not a flag that somebody must reset.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.utils import parametrize

from bssn_fast.calls.composite import in_fake_mode
from bssn_fast.calls.contents import contents_of, version
from bssn_fast.calls.serving import is_same, leads_to, serves, unless_frozen
from bssn_fast.distributed.sharded import is_sharded
from bssn_fast.modules.call import Source
from bssn_fast.modules.recomputation import in_backward
from bssn_fast.tracing.recording import iterated_in_torchs_block, note_in_torchs_block


class Entry(NamedTuple):
    """A layer's result, and what it was made of."""

    weight: Tensor
    weight_version: int
    result: Tensor
    source: Source | None
    gain: Tensor | None
    # Of weight, result and gain; None where versions alone cannot tell whether they have changed.
    contents: bytes | None

    def holds(self, weight: Tensor) -> bool:
        """Whether it was made of this weight as it is now: no other power iteration is due."""
        if not is_same(weight, self.weight) or self.weight_version != version(weight):
            return False
        return self.contents is None or contents_of([weight]) == self.contents[:8]

    def current(self) -> bool:
        """Whether neither the weight nor the result has changed, for certain."""
        return (
            self.contents is not None
            and self.weight_version == version(self.weight)
            and contents_of(_all(self.weight, self.result, self.gain)) == self.contents
        )


def _all(weight: Tensor, result: Tensor, gain: Tensor | None) -> list[Tensor]:
    return [weight, result] if gain is None else [weight, result, gain]


class Block:
    """Results of layers, by id of the layer's parametrization, until the block ends.

    covers: the ids of the layers concerned; None for all.
    """

    def __init__(self, covers: frozenset[int] | None, running: Callable[[], bool]) -> None:
        self.covers, self.running = covers, running
        self._around = parametrize._cache if parametrize._cache_enabled else None
        self._entries: dict[int, Entry] = {}
        self._iterated: set[int] = set()  # layers, whether or not their results could be kept

    def find(self, norm: Any, weight: Tensor) -> Entry | None:
        """Return a layer's result if it is that of this weight as it is now, and of use to who asks.

        In a backward pass it may be needed by a forward that is repeated, whose own backward pass would free its graph.
        """
        entry = self._entries.get(id(norm))
        if entry is None or entry.weight is not weight or not entry.current() or not serves(entry.result, weight):
            return None
        if entry.gain is not norm.gain or (entry.gain is not None and not leads_to(entry.result, entry.gain)):
            return None
        entry = entry._replace(result=unless_frozen(entry.result, weight, entry.gain))
        return None if entry.result.requires_grad and in_backward() else entry

    def iterated(self, norm: Any, weight: Tensor) -> bool:
        """Whether the vectors have had their iteration for this weight."""
        entry = self._entries.get(id(norm))
        if entry is not None:
            return entry.holds(weight)
        if id(norm) in self._iterated or (norm.traced.in_block and norm.traced.iterated):
            return True
        return iterated_in_torchs_block(norm)

    def inside_torchs(self) -> bool:
        """Whether it began in a `parametrize.cached` that still runs: torch throws away its cache when that ends."""
        return self._around is not None and self._around is parametrize._cache and parametrize._cache_enabled > 0

    def note_iteration(self, norm: Any) -> None:
        """Remember that a layer's vectors have had their iteration, for compiled code too."""
        if not in_fake_mode():
            self._iterated.add(id(norm))
            norm.traced.iterated = norm.traced.in_block
            note_in_torchs_block(norm)

    def keep(self, norm: Any, weight: Tensor, result: Tensor, source: Source | None) -> None:
        """Keep a layer's result for later calls."""
        # Ranks must not differ in what they find here: versions are the same on all.
        contents = None if is_sharded(weight) else contents_of(_all(weight, result, norm.gain))
        self._entries[id(norm)] = Entry(weight, version(weight), result, source, norm.gain, contents)

    def forget(self, norm: object) -> None:
        """Drop a layer's result, as its settings have changed."""
        self._entries.pop(id(norm), None)


_blocks: tuple[Block, ...] = ()  # the outer ones first; replaced as a whole, so that no thread sees it half changed
_of_torch: tuple[object, Block] | None = None


def block_of(norm: object) -> Block | None:
    """Return the outermost running block that covers a layer."""
    for block in _blocks:
        if (block.covers is None or id(norm) in block.covers) and block.running():
            return _block_of_torch() if block.inside_torchs() else block
    return _block_of_torch() if parametrize._cache_enabled else None


def _block_of_torch() -> Block:
    """Return the block that stands for `parametrize.cached`: torch throws away its cache when that ends."""
    global _of_torch
    cache = parametrize._cache
    if _of_torch is None or _of_torch[0] is not cache:
        _of_torch = cache, Block(None, lambda: bool(parametrize._cache_enabled) and parametrize._cache is cache)
    return _of_torch[1]


def any_block() -> bool:
    """Whether a block may be running; quick."""
    global _of_torch
    if parametrize._cache_enabled > 0:
        return True
    _of_torch = None  # with all that it holds
    return bool(_blocks)


class _Manager(contextlib._GeneratorContextManager[None, Any, None]):
    """A context manager that gives its generator, which has a frame as long as the `with` statement runs."""

    def __enter__(self) -> None:
        (norms,) = self.args
        generator = weakref.ref(self.gen)

        def running() -> bool:
            found: Any = generator()
            return found is not None and found.gi_frame is not None

        block = Block(frozenset(map(id, norms)), running)
        self.gen.send(None)  # up to where it waits for its block
        self.gen.send(block)


def share(norms: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
    """Return a context manager for a block of these layers."""
    return _Manager(_run, (list(norms),), {})


def _run(norms: list[Any]) -> Generator[None, Any, None]:
    global _blocks
    block = yield
    try:
        _blocks = (*[b for b in _blocks if b.running()], block)
        _tell_compiled_code(norms)
        yield
    finally:
        try:
            _blocks = tuple([b for b in _blocks if b is not block and b.running()])
            _tell_compiled_code(norms)
        finally:  # again, should an interrupt have kept the first from ending
            _blocks = tuple([b for b in _blocks if b is not block and b.running()])
            _tell_compiled_code(norms)


def _tell_compiled_code(norms: list[Any]) -> None:
    """Let compiled code, which cannot ask for blocks, know whether its layers are in one."""
    for norm in norms:
        inside = any(id(norm) in b.covers for b in _blocks if b.covers is not None)
        if not inside or not norm.traced.in_block:
            norm.traced.iterated = False
        norm.traced.in_block = inside
