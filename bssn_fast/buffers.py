"""Flat buffers for results, used again once nothing refers to the last result any more.

Fresh memory from the operating system comes page by page, each of them cleared: on a CPU that costs several times what
the kernels cost. CUDA's caching allocator already does this, so that buffers there are simply allocated.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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

    dtype: torch.dtype
    views: list[Tensor]
    address: int
    storage: int  # the address of torch's object for the memory
    users: int  # of the storage, when nobody else refers to it

    def free(self) -> bool:
        """Whether no tensor, saved variable or other owner shares the memory."""
        return torch._C._storage_Use_Count(self.storage) == self.users

    def moved(self) -> bool:
        """Whether the memory has been replaced, as by shared memory that another process may be reading."""
        return self.views[0].data_ptr() != self.address


def _new_buffer(views: list[Tensor]) -> _Buffer:
    storage = views[0].untyped_storage()._cdata
    return _Buffer(views[0].dtype, views, views[0].data_ptr(), storage, torch._C._storage_Use_Count(storage))


class Pool:
    """Flat buffers of one size. Keeps as many as were in use at the same time."""

    def __init__(self, size: int, views: Callable[[Tensor], list[Tensor]]) -> None:
        self._size, self._views = size, views
        self._buffers: list[_Buffer] = []
        self._lock = threading.Lock()

    def take(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Return `views` of a buffer of arbitrary contents that no one else uses.

        To torch they are no views of it: what is written into one of them does not count as a change of the others.
        """
        if torch._C._len_torch_dispatch_stack() > 0:  # a compiler follows: to it they are views
            return self._views(torch.empty(self._size, dtype=dtype, device=device))
        if device.type != "cpu" or not _COUNTS:
            return [view.data for view in self._views(torch.empty(self._size, dtype=dtype, device=device))]
        with self._lock:  # the results must exist before another thread looks for a free buffer
            self._buffers = [b for b in self._buffers if not b.moved() and (b.dtype == dtype or not b.free())]
            for buffer in self._buffers:
                if buffer.dtype == dtype and buffer.free():
                    return [view.data for view in buffer.views]
            with torch.inference_mode(False):
                flat = torch.empty(self._size, dtype=dtype, device=device)
                _ask_for_large_pages(flat)
                views = self._views(flat)
            del flat
            self._buffers.append(_new_buffer(views))
            return [view.data for view in views]
