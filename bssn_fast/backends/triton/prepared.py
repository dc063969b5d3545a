"""What is kept from call to call, tables on the device, and the buffers that a call works in."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from bssn_fast.backends import BackendUnavailableError
from bssn_fast.backends.triton import kernels
from bssn_fast.backends.triton.fields import SEGMENT_FIELDS, encode
from bssn_fast.backends.triton.program import Program

TABLE_CHUNK = 256
"""Numbers written per launch of the table kernel: 2 KB of arguments, of which CUDA takes 4."""

MAX_ARGUMENTS = 256
"""Gradients whose addresses are arguments of the backward kernel: 2 KB as well. More lie in a table."""

MAX_KEPT = 64
"""Sets of programs kept; a model needs one forward and one backward per stream, and the longest unused go first."""


def empty_table(size: int, device: torch.device) -> Tensor:
    """Return memory on the device for at least `size` numbers."""
    return torch.empty(-(-size // TABLE_CHUNK) * TABLE_CHUNK, dtype=torch.int64, device=device)


def write_table(table: Tensor, values: Sequence[int]) -> None:
    """Write numbers to the device, by kernels of which they are arguments."""
    for start in range(0, len(values), TABLE_CHUNK):
        chunk = [encode(value) for value in values[start : start + TABLE_CHUNK]]
        chunk += [encode(0)] * (TABLE_CHUNK - len(chunk))
        kernels.table_kernel[(1,)](table, start, tuple(chunk), num_warps=1)


@contextmanager
def loading(device: torch.device) -> Iterator[None]:
    """Whatever goes wrong within, a compiler or a driver that refuses a kernel, means that Triton cannot be used."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise BackendUnavailableError(
            f"bssn_fast backend 'triton' cannot be used on {device}: Triton cannot compile or load a kernel for these "
            f"weights ({type(error).__name__}: {text}); try another version of Triton, or another backend"
        ) from error


class Prepared:
    """A program with its table on the device; `indices` are its layers' in the call."""

    def __init__(
        self,
        program: Program,
        indices: list[int],
        single: bool,
        aligned: bool,
        device: torch.device,
    ) -> None:
        self.program = program
        self.indices = indices
        self.single = single
        self.aligned = aligned
        self.loaded = False  # its kernel, on the device
        table = empty_table(len(program.values), device)
        with loading(device):
            kernels.load(kernels.table_kernel, table, 0, (encode(0),) * TABLE_CHUNK, num_warps=1)
        write_table(table, program.values)
        split = program.n_segments * SEGMENT_FIELDS.value
        self.segments, self.layers = table[:split], table[split:]


class Buffers:
    """What one call works in. The allocator keeps it from others until the stream has come past the call.

    So the calls of a model that is gone hold no memory, two threads may call on one stream, and while a CUDA graph is
    captured the memory is the graph's own.
    """

    def __init__(self, prepared: Prepared, like: Tensor) -> None:
        program = prepared.program
        self.scratch = like.new_empty(max(program.scratch_size, 1))
        self.stats = like.new_empty(program.stats_size, dtype=torch.float64)
        many = len(prepared.indices) > MAX_ARGUMENTS
        self.addresses = empty_table(len(prepared.indices), like.device) if many else self.stats


def new_counters(prepared: Prepared, like: Tensor) -> Tensor:
    """Return counters that are zero: launches one after another can share them, as `take_tile` has it."""
    return like.new_zeros(prepared.program.counters_size if prepared.single else 1, dtype=torch.int64)


Made = tuple[Prepared | None, list[int]]
"""A program, if there are layers for it, and the indices of layers that it leaves to the reference."""

Found = tuple[Prepared | None, Tensor | None, list[int]]
"""The same with the program's counters."""


def _with_counters(made: Made, like: Tensor) -> Found:
    prepared, others = made
    return prepared, new_counters(prepared, like) if prepared else None, others


def _made_to_stay(make: Callable[[], Made], like: Tensor) -> Found:
    """Make what is kept, in a thread and on a stream of its own.

    Where torch.compile uses CUDA graphs, it runs a function once before it captures it. What the running thread (with
    older versions of torch: the current stream) allocates then is the graph's memory, and of that nothing may stay.
    """
    if not like.is_cuda:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: _with_counters(make(), like)).result()
    current, other = torch.cuda.current_stream(like.device), torch.cuda.Stream(like.device)
    other.wait_stream(current)

    def on_the_other_stream() -> Found:
        with torch.cuda.stream(other):
            return _with_counters(make(), like)

    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(on_the_other_stream).result()
    current.wait_stream(other)
    prepared, counters, _ = found
    for kept in (counters, prepared.segments if prepared else None):
        if kept is not None:
            kept.record_stream(current)
    return found


class Cache:
    """Programs by what they were made for, per stream: calls on different streams may overlap.

    A program is a table and counters, a few kilobytes.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Hashable, int], Found] = OrderedDict()
        self._captured: dict[Hashable, Made] = {}
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget all: after a launch that failed, the state of its counters is unknown."""
        with self._lock:
            self._kept.clear()

    def get(self, key: Hashable, like: Tensor, make: Callable[[], Made]) -> Found:
        """Return what was kept for `key`, or make it on the current stream.

        While a CUDA graph is captured, its counters are its own (they are cleared at every replay), and a table that it
        refers to is never freed again: nothing tells when a graph is gone. A table made during capture is the graph's
        own and written at every replay.
        """
        with self._lock:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                return self._for_graph(key, like, make)
            stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
            found = self._kept.get((key, stream))
            if found is None:
                found = _made_to_stay(make, like)
                self._kept[(key, stream)] = found
                while len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end((key, stream))
            return found

    def _for_graph(self, key: Hashable, like: Tensor, make: Callable[[], Made]) -> Found:
        kept = next((found for (k, _), found in self._kept.items() if k == key), None)
        known = (kept[0], kept[2]) if kept else self._captured.get(key)
        if known is None:
            return _with_counters(make(), like)
        self._captured[key] = known
        return _with_counters(known, like)
