"""Whether tensors are what they were: torch counts some writes, and of those that it does not count a hash tells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bssn_fast.backends import cpu, extension
from bssn_fast.layout import PLAIN_CLASSES, has_its_memory, is_dense


def version(tensor: Tensor) -> int:
    """Return the tensor's version, which grows with most changes in place; -1 where torch keeps none."""
    try:
        return tensor._version
    except RuntimeError:  # a tensor made in inference mode
        return -1


def contents_of(tensors: Sequence[Tensor], *, readable: bool = False) -> bytes | None:
    """Return hashes of all elements, 8 bytes for each tensor; None where there are none.

    Fake tensors, and others without memory of their own, or whose memory has been freed, have none.
    readable: they are known to be dense and to have their memory; otherwise it is found out.
    torch keeps no version of what is written through `.data`, a NumPy array, fused optimizers and some collectives. On
    a GPU looking at elements would mean to wait for the device.
    """
    if extension.module is None or any(x.device.type != "cpu" or type(x) not in PLAIN_CLASSES for x in tensors):
        return None
    with torch.no_grad():
        if not readable:
            if not all(map(has_its_memory, tensors)):
                return None
            tensors = [x if is_dense(x) else x.contiguous() for x in tensors]  # a hash reads one stretch of memory
        return cpu.hashes(tensors)
