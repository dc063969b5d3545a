"""The C++ kernels of csrc/cpu: vectorised, threaded, one call for all layers.

Threads are those of torch's own OpenMP runtime where it can be found, `torch.get_num_threads()` of them. Results have
the same bits for any number of threads.
"""

from __future__ import annotations

import ctypes
from array import array
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from bssn_fast.backends import extension
from bssn_fast.layout import snapshot_offsets

DEVICES = ("cpu",)

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CHANNEL_MAJOR, _KERNEL_MAJOR, _STRIDED = range(3)


def why_unavailable() -> str | None:
    return extension.why_missing()


def _gomp_parallel() -> int:
    """Return the address of GOMP_parallel in the OpenMP runtime of torch, or 0."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):
        return 0


if extension.module is not None:
    extension.module.cpu_set_openmp(_gomp_parallel())


@lru_cache(maxsize=4096)
def _geometry(shape: tuple[int, ...], strides: tuple[int, ...], dim: int) -> tuple[tuple[int, ...], array[int]]:
    """Return the geometric fields of `struct Layer` for a weight, and the offsets that they point to."""
    c_out, c_in, k = shape[dim], shape[1 - dim], prod(shape[2:])
    offsets = array("q", [0])
    for size, stride in zip(shape[2:], strides[2:], strict=True):
        offsets = array("q", [o + position * stride for o in offsets for position in range(size)])
    rows_packed = c_out == 1 or strides[dim] == c_in * k
    channels_packed = c_in == 1 or strides[1 - dim] == 1
    if rows_packed and (c_in == 1 or strides[1 - dim] == k) and offsets == array("q", range(k)):
        order = _CHANNEL_MAJOR
    elif rows_packed and channels_packed and offsets == array("q", range(0, k * c_in, c_in)):
        order = _KERNEL_MAJOR
    else:
        order = _STRIDED
    return (c_out, c_in, k, order, strides[dim], strides[1 - dim], offsets.buffer_info()[0]), offsets


def _check(error: int) -> None:
    if error:
        raise MemoryError("bssn_fast: no memory for the workspace of the CPU kernels")


def forward(
    weights: list[Tensor],
    vectors: list[Tensor],
    dims: list[int],
    two_sided: list[bool],
    scale: float,
    eps: float,
    n_power_iterations: int,
    normalized: list[Tensor],
    snapshot: Tensor,
    sigma: Tensor,
) -> None:
    shapes = tuple([w.shape for w in weights])
    starts, _ = snapshot_offsets(shapes, tuple(dims), tuple(two_sided))
    size = sigma.element_size()
    base, sigma_address = snapshot.data_ptr(), sigma.data_ptr()
    addresses = iter([v.data_ptr() for v in vectors])
    fields: list[int] = []
    for j, (weight, dim) in enumerate(zip(weights, dims, strict=True)):
        geometry, _ = _geometry(shapes[j], weight.stride(), dim)
        fields += geometry
        fields += (weight.data_ptr(), 0, normalized[j].data_ptr(), next(addresses), next(addresses))
        fields += (next(addresses), next(addresses)) if two_sided[j] else (0, 0)
        fields += [base + size * start for start in starts[j]]
        fields += (sigma_address + size * j,) if two_sided[j] else (0, 0, sigma_address + size * j)
    table = array("q", fields)
    _check(
        extension.module.cpu_forward(
            table.buffer_info()[0],
            len(weights),
            _DTYPES[weights[0].dtype],
            _DTYPES[normalized[0].dtype],
            scale,
            eps,
            n_power_iterations,
            torch.get_num_threads(),
        )
    )


def backward(
    grads: list[Tensor],
    weights: list[Tensor],
    layers: list[int],
    dims: list[int],
    two_sided: list[bool],
    scale: float,
    snapshot: Tensor,
    sigma: Tensor,
    grad_weights: list[Tensor],
) -> None:
    shapes = tuple([w.shape for w in weights])
    starts, _ = snapshot_offsets(shapes, tuple(dims), tuple(two_sided))
    size = sigma.element_size()
    base, sigma_address = snapshot.data_ptr(), sigma.data_ptr()
    fields: list[int] = []
    for grad, grad_weight, j in zip(grads, grad_weights, layers, strict=True):
        geometry, _ = _geometry(shapes[j], weights[j].stride(), dims[j])
        fields += geometry
        fields += (weights[j].data_ptr(), grad.data_ptr(), grad_weight.data_ptr())
        fields += [base + size * start for start in starts[j]]
        fields += (0,) * (4 if two_sided[j] else 6)
        fields.append(sigma_address + size * j)
    table = array("q", fields)
    _check(
        extension.module.cpu_backward(
            table.buffer_info()[0],
            len(layers),
            _DTYPES[weights[0].dtype],
            _DTYPES[grads[0].dtype],
            scale,
            torch.get_num_threads(),
        )
    )
