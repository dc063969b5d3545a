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

import torch
from torch import Tensor


def _users(tensor: Tensor) -> int:
    """Return how many tensors, saved variables and other owners share a tensor's storage, plus a constant."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _unshared() -> int | None:
    """Return what `_users` gives for a tensor that has its storage for itself; None without that function."""
    if not hasattr(torch._C, "_storage_Use_Count"):
        return None
    return _users(torch.empty(1))


_UNSHARED = _unshared()


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


class Pool:
    """Flat buffers of one size. Keeps as many as were in use at the same time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._buffers: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, dtype: torch.dtype, device: torch.device, views: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """Return `views` of a buffer of arbitrary contents that no one else uses."""
        if device.type != "cpu" or _UNSHARED is None or torch._C._len_torch_dispatch_stack() > 0:
            return views(torch.empty(self.size, dtype=dtype, device=device))
        # `data`, as each use needs versions of its own: views that `.data =` has moved away count on with theirs.
        with self._lock:  # the views must exist before another thread looks for a free buffer
            self._buffers = [b for b in self._buffers if b.dtype == dtype or _users(b) != _UNSHARED]
            for buffer in self._buffers:
                if buffer.dtype == dtype and _users(buffer) == _UNSHARED:
                    return views(buffer.data)
            with torch.inference_mode(False):
                self._buffers.append(torch.empty(self.size, dtype=dtype, device=device))
            _ask_for_large_pages(self._buffers[-1])
            return views(self._buffers[-1].data)
