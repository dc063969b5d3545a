"""Flat buffers for results, used again once nothing refers to the last result any more.

Fresh memory from the operating system comes page by page, each of them cleared: on a CPU that costs several times what
the kernels cost. CUDA's caching allocator already does this, so that buffers there are simply allocated.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

_COUNTS = hasattr(torch._C, "_storage_Use_Count")


_LARGE = 4 << 20
_MADV_HUGEPAGE = 14


def _ask_for_large_pages(buffer: Tensor) -> None:
    """Ask Linux for pages of 2 MB for a large buffer that nobody has written to yet: a tenth of a forward's time.

    An error leaves the pages as they are.
    """
    if sys.platform != "linux" or buffer.nbytes < _LARGE:
        return
    first = -(-buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (buffer.data_ptr() + buffer.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), _MADV_HUGEPAGE)


class _Buffer(NamedTuple):
    """Memory for the results of one call, and tensors that lie in it."""

    parts: list[Tensor]
    address: int
    storage: int  # the address of torch's object for the memory
    users: int  # of the storage, when nobody else refers to it
    token: list[None]  # whoever has taken it off may look at the buffer: no lock, which a fork could leave locked

    @staticmethod
    def of(parts: list[Tensor]) -> _Buffer:
        storage = parts[0].untyped_storage()._cdata
        return _Buffer(parts, parts[0].data_ptr(), storage, torch._C._storage_Use_Count(storage), [None])

    def free(self) -> bool:
        """Whether no tensor, saved variable or other owner shares the memory."""
        return torch._C._storage_Use_Count(self.storage) == self.users

    def moved(self) -> bool:
        """Whether the memory has been replaced, as by shared memory that another process may be reading."""
        return self.parts[0].data_ptr() != self.address

    def take(self) -> list[Tensor] | None:
        """Return tensors that share the memory; None if someone else uses it, or another thread looks at it."""
        try:
            self.token.pop()
        except IndexError:
            return None
        try:  # the results must exist before another thread looks
            return [part.data for part in self.parts] if self.free() and not self.moved() else None
        finally:
            self.token.append(None)


class _Shelf:
    """Buffers of one dtype.

    A search goes on where the last one ended, as the buffers before were in use a moment ago, and begins anew when the
    first one is free, as at the next step of a training. So it takes a constant time on average, also where thousands
    of forwards are in flight, and the buffers at the end are the ones that are needed least often.
    """

    WINDOW = 64
    """After so many searches, buffers that none of them has come to are given back."""

    def __init__(self) -> None:
        self._buffers: list[_Buffer] = []
        self._next = self._searches = 0  # since the last beginning
        self._in_window = self._furthest = 0

    def find(self) -> list[Tensor] | None:
        """Return tensors in a free buffer, or None if there is none or it would take long to find."""
        buffers = self._buffers  # read once: another thread may replace it
        self._searches += 1
        self._in_window += 1
        if self._in_window > self.WINDOW:
            buffers = self._buffers = [b for b in buffers[: self._furthest + 1] if not b.moved()]
            self._in_window = self._furthest = 0
        if buffers and buffers[0].free():
            self._next = self._searches = 0
        found = self._search(buffers)
        if found is None and 2 * self._searches > len(buffers):
            self._next = self._searches = 0
            found = self._search(buffers)
        self._furthest = max(self._furthest, self._next)
        return found

    def _search(self, buffers: list[_Buffer]) -> list[Tensor] | None:
        while (j := self._next) < len(buffers):  # read once: other threads search too
            self._next = j + 1
            found = buffers[j].take()
            if found is not None:
                return found
        return None

    def add(self, parts: list[Tensor]) -> list[Tensor]:
        """Return tensors in a new buffer, that of these."""
        buffer = _Buffer.of(parts)
        found = buffer.take()
        assert found is not None, "nobody else has it yet"
        self._buffers.append(buffer)
        return found


class Pool:
    """Flat buffers of one size. Keeps about as many as were in use at the same time lately."""

    def __init__(self, size: int, parts: Callable[[Tensor], list[Tensor]]) -> None:
        self._size, self._parts = size, parts
        self._shelves: dict[torch.dtype, _Shelf] = {}

    def take(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Return the `parts` of a buffer of arbitrary contents that no one else uses."""
        followed = torch._C._len_torch_dispatch_stack() > 0 or is_dynamo_compiling()  # who follows keeps memory
        if device.type != "cpu" or not _COUNTS or followed:
            return self._parts(torch.empty(self._size, dtype=dtype, device=device))
        shelf = self._shelves.get(dtype) or self._shelves.setdefault(dtype, _Shelf())
        found = shelf.find()
        if found is None:
            with torch.inference_mode(False):
                flat = torch.empty(self._size, dtype=dtype, device=device)
                _ask_for_large_pages(flat)
                parts = self._parts(flat)
            del flat
            found = shelf.add(parts)
        return found
