"""The C++ kernels of csrc/cpu: vectorised, threaded, one call for all layers.

Threads are those of torch's own OpenMP runtime where it can be found, `torch.get_num_threads()` of them. Results have
the same bits for any number of threads.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from bssn_fast.backends import extension
from bssn_fast.backends.addresses import addresses, elements
from bssn_fast.laws import Laws
from bssn_fast.layout import Batch, channels, compute_dtype, picked

DEVICES = ("cpu",)

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CHANNEL_MAJOR, _KERNEL_MAJOR, _STRIDED, _INPUT_MAJOR = range(4)


def why_unavailable(device: torch.device) -> str | None:
    return extension.why_missing()


def _gomp_parallel() -> int:
    """Return the address of GOMP_parallel in the OpenMP runtime of torch, or 0."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):
        return 0


if extension.module is not None:
    extension.module.cpu_set_openmp(_gomp_parallel())


class _Table:
    """The geometries of some layers as `struct Geometry` of csrc/layer.h, while this object lives."""

    def __init__(self, batch: Batch, layers: Iterable[int], converts: bool) -> None:
        fields: list[int] = []
        self._kernel_offsets = []  # the table points to them
        for j in layers:
            shape, stride, dim = batch.shapes[j], batch.strides[j], batch.dims[j]
            both, begin = batch.two_sided[j], batch.snapshot_offsets[j]
            offsets = _kernel_offsets(shape, stride)
            self._kernel_offsets.append(offsets)
            order = _order(shape, stride, dim, offsets, converts)
            c_out, c_in, k = channels(shape, dim)
            fields += (c_out, c_in, k, both, order, stride[dim], stride[1 - dim], offsets.buffer_info()[0])
            fields += begin if both else (*begin, 0, 0)
        self._fields = array("q", fields)
        self.address = self._fields.buffer_info()[0]


def _kernel_offsets(shape: tuple[int, ...], strides: tuple[int, ...]) -> array[int]:
    """Return where each kernel position lies, in elements from the first."""
    offsets = array("q", [0])
    for size, stride in zip(shape[2:], strides[2:], strict=True):
        offsets = array("q", [o + position * stride for o in offsets for position in range(size)])
    return offsets


def _order(
    shape: tuple[int, ...], strides: tuple[int, ...], dim: int, kernel_offsets: array[int], converts: bool
) -> int:
    """Return how the weight lies in memory, as `enum Order` numbers it."""
    c_out, c_in, k = channels(shape, dim)
    if c_out == 1 or strides[dim] == c_in * k:
        stride_in = strides[1 - dim]
        if (c_in == 1 or stride_in == k) and kernel_offsets == array("q", range(k)):
            return _CHANNEL_MAJOR
        if (c_in == 1 or stride_in == 1) and kernel_offsets == array("q", range(0, k * c_in, c_in)):
            return _KERNEL_MAJOR
    packed = (
        strides[1 - dim] == c_out * k and (c_out == 1 or strides[dim] == k) and kernel_offsets == array("q", range(k))
    )
    return _INPUT_MAJOR if packed and not converts else _STRIDED


def _converts(weights: list[Tensor], others: list[Tensor]) -> bool:
    """Whether the kernels must convert weights or gradients, which they do for rows of output channels."""
    return not weights[0].dtype == others[0].dtype == compute_dtype(weights[0].dtype)


def hashes(tensors: Sequence[Tensor]) -> bytes:
    """Return one 64-bit hash for each tensor, over all its bytes, one after another; equal where nothing has changed.

    A single changed element is seen for certain, other changes with probability 1 - 2^-64. The tensors are dense, in
    any order of dimensions, and on the CPU.
    """
    n = len(tensors)
    sizes = array("q", [t.nbytes for t in tensors]).tobytes()
    found = array("Q", bytes(8 * n))
    threads = torch.get_num_threads()
    _check(extension.module.cpu_hash(addresses(tensors), sizes, n, threads, found.buffer_info()[0]))
    return found.tobytes()


_table = lru_cache(maxsize=256)(_Table)


def _check(error: int) -> None:
    if error:
        raise MemoryError("bssn_fast: no memory for the workspace of the CPU kernels")


def forward(
    batch: Batch,
    weights: list[Tensor],
    vectors: list[Tensor],
    laws: Laws,
    eps: float,
    n_power_iterations: int,
    normalized: list[Tensor],
    snapshot: Tensor,
    sigma: Tensor,
) -> None:
    outputs = addresses(normalized) or bytes(8 * len(weights))
    normalized = normalized or weights
    table = _table(batch, range(len(weights)), _converts(weights, normalized))
    pointers = addresses(weights) + outputs + addresses(vectors, laws.gains)
    error = extension.module.cpu_forward(
        table.address,
        len(weights),
        pointers,
        snapshot.data_ptr(),
        sigma.data_ptr(),
        _DTYPES[weights[0].dtype],
        _DTYPES[normalized[0].dtype],
        laws.address,
        eps,
        n_power_iterations,
        torch.get_num_threads(),
    )
    _check(error)


def backward(
    batch: Batch,
    grads: list[Tensor],
    weights: list[Tensor],
    layers: list[int],
    laws: Laws,
    snapshot: Tensor,
    sigma: Tensor,
    grad_weights: list[Tensor],
    grad_gains: Tensor | None,
) -> None:
    which = tuple(layers)
    table = _table(batch, which, _converts(weights, grads))
    n, laws = len(layers), laws.part(layers)
    sigmas = elements(sigma.data_ptr(), sigma.element_size(), which)
    pointers = addresses(picked(weights, layers), grads, grad_weights) + sigmas + addresses(laws.gains)
    error = extension.module.cpu_backward(
        table.address,
        n,
        pointers,
        snapshot.data_ptr(),
        _DTYPES[weights[0].dtype],
        _DTYPES[grads[0].dtype],
        laws.address,
        0 if grad_gains is None else grad_gains.data_ptr(),
        torch.get_num_threads(),
    )
    _check(error)
