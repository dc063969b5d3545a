"""Where tensors lie in memory, of many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from struct import pack

import torch
from torch import Tensor

from bssn_fast.backends import extension

_in_one_call = getattr(extension.module, "addresses", None)
# The address of a C function from a tensor to its memory, which torch gives to the C++ code that its compiler makes.
_of_torch: int | None = getattr(torch._C._dynamo.guards, "_torchinductor_pyobject_tensor_data_ptr", None)


def addresses(*lists: Sequence[Tensor]) -> bytes:
    """Return `data_ptr()` of all tensors of all lists, one after another, as 64-bit integers.

    Raises RuntimeError for what has no memory of its own, as a sparse tensor has none.
    """
    if _in_one_call is not None and _of_torch is not None:
        found: bytes = _in_one_call(_of_torch, *lists)
        return found
    each = [x.data_ptr() for tensors in lists for x in tensors]
    return pack(f"{len(each)}q", *each)


@lru_cache(maxsize=256)  # a training that repeats itself finds the same memory again
def elements(first: int, size: int, which: tuple[int, ...]) -> bytes:
    """Return where elements of this size lie, in bytes, in an array that begins at the first address; likewise."""
    return pack(f"{len(which)}q", *[first + size * j for j in which])
