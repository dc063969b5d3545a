"""The CUDA C++ kernels of csrc/cuda: one launch forward, one backward, on NVIDIA GPUs, with neither Triton nor nvcc.

BSSN_FAST_CUDA_LAUNCH=single runs all phases in one launch, in which tiles wait for those they build on (the default);
BSSN_FAST_CUDA_LAUNCH=phases starts one launch per phase. With several power iterations, each is a launch of its own.

BSSN_FAST_CUDA_PLAN chooses how a call in one launch reads weights and gradients. `tiles` (the default) reads weights
twice forward, and gradients twice backward, the second time partly out of the cache. Two more wait for a GPU to say
that they are faster: `clusters` gives small layers of a forward pass to a cluster of eight blocks each, on GPUs that
have clusters (compute capability 9.0 and later), and `keep` has rows of weights, or of gradients, stay on the chip, as
many as it has room for, from the first reading until they are written.

A call with weights that the kernels do not address (fp64, 2^31 elements or more, none at all, kernel dimensions that do
not form one stride) is computed by Triton where it works, else by the reference.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from bssn_fast import backends
from bssn_fast.backends import extension
from bssn_fast.backends.addresses import addresses, elements
from bssn_fast.backends.environment import environment
from bssn_fast.laws import Laws
from bssn_fast.layout import Batch, channels, picked

DEVICES = ("cuda",)

_PLANS = {"tiles": 0, "clusters": 2, "keep": 3}
_PHASES = 1
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_unavailable(device: torch.device) -> str | None:
    if extension.module is None:
        return extension.why_missing()
    if not hasattr(extension.module, "cuda_forward"):
        reason = extension.not_built.get("cuda", "nvcc was not found")
        return f"the extension was built without CUDA: {reason}"
    if not torch.cuda.is_available() or torch.version.hip:
        return "torch sees no NVIDIA GPU; check the driver and that torch was installed with CUDA"
    error = extension.module.cuda_status(device.index)
    if error == 0:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"CUDA says '{_words(error)}'; update the driver, or reinstall with this machine's CUDA toolkit for this GPU: "
        f"`BSSN_FAST_CUDA_ARCHS={major}{minor} pip install --force-reinstall --no-deps .`"
    )


def _words(error: int) -> str:
    words: str = extension.module.cuda_error_string(error)
    return words


def _check(error: int, what: str, device: torch.device) -> None:
    if error:
        raise RuntimeError(f"bssn_fast: {what} on {device} failed: CUDA says '{_words(error)}' (error {error})")


class _Table:
    """The geometries of some layers as `struct Geometry` of csrc/cuda/layer.h, while this object lives."""

    def __init__(self, batch: Batch, layers: Sequence[int]) -> None:
        fields: list[int] = []
        self.addressable = True
        self._workspace: dict[tuple[bool, int, torch.dtype, torch.device], int] = {}
        for j in layers:
            shape, stride, dim = batch.shapes[j], batch.strides[j], batch.dims[j]
            both, begin = batch.two_sided[j], batch.snapshot_offsets[j]
            step = _kernel_stride(shape, stride)
            self.addressable &= step is not None and 0 < prod(shape) < 2**31
            fields += (*channels(shape, dim), both, stride[dim], stride[1 - dim], step or 0)
            fields += begin if both else (*begin, 0, 0)
        self._fields = array("q", fields)
        self._n = len(layers)
        self.address = self._fields.buffer_info()[0]

    def workspace(self, backward: bool, way: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate the device memory that a call of this way needs. dtype: of weights, or backward of gradients."""
        key = backward, way, dtype, device
        if key not in self._workspace:
            ask = extension.module.cuda_backward_workspace if backward else extension.module.cuda_forward_workspace
            size = ask(self.address, self._n, _DTYPES[dtype], way, device.index)
            _check(max(-size, 0), "asking for the limits", device)
            self._workspace[key] = size
        return torch.empty(self._workspace[key], dtype=torch.uint8, device=device)


def _kernel_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Return the distance between neighbouring kernel positions in elements, or None if it is not always the same."""
    step, span = 1, None
    for size, stride in reversed(list(zip(shape[2:], strides[2:], strict=True))):
        if size == 1:
            continue
        if span is None:
            step = span = stride
        elif stride != span:
            return None
        span *= size
    return step


_table = lru_cache(maxsize=256)(_Table)


def _instead(operation: str, device: torch.device, *args: Any) -> None:
    """Have Triton, where it works, or the reference compute what these kernels do not address."""
    if ("triton", device) not in backends.given_up and backends.why_unavailable("triton", device) is None:
        try:
            getattr(backends.get("triton", device), operation)(*args)
            return
        except backends.BackendUnavailableError as error:  # before anything was written
            backends.given_up["triton", device] = str(error)
    getattr(backends.get("reference", device), operation)(*args)


def _single_launch() -> bool:
    mode = environment("BSSN_FAST_CUDA_LAUNCH") or "single"
    if mode not in ("single", "phases"):
        raise ValueError(f"BSSN_FAST_CUDA_LAUNCH must be 'single' or 'phases', not {mode!r}")
    return mode == "single"


def _way() -> int:
    """Return how a call runs: `enum class Way` of csrc/cuda/layer.h."""
    plan = environment("BSSN_FAST_CUDA_PLAN") or "tiles"
    if plan not in _PLANS:
        raise ValueError(f"BSSN_FAST_CUDA_PLAN must be {', '.join(map(repr, _PLANS))}, not {plan!r}")
    if _single_launch():
        return _PLANS[plan]
    if plan != "tiles":
        raise ValueError(f"BSSN_FAST_CUDA_PLAN={plan} needs BSSN_FAST_CUDA_LAUNCH=single; unset one of the two")
    return _PHASES


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


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
    n, device, dtype = len(weights), sigma.device, weights[0].dtype
    table = _table(batch, range(n))
    out_dtype = normalized[0].dtype if normalized else dtype
    if not table.addressable or not {dtype, out_dtype} <= _DTYPES.keys():
        results = (normalized, snapshot, sigma)
        _instead("forward", device, batch, weights, vectors, laws, eps, n_power_iterations, *results)
        return
    outputs = addresses(normalized) or bytes(8 * n)
    pointers = addresses(weights) + outputs + addresses(vectors, laws.gains)
    way = _way()
    workspace = table.workspace(False, way, dtype, device)
    error = extension.module.cuda_forward(
        table.address,
        n,
        pointers,
        snapshot.data_ptr(),
        sigma.data_ptr(),
        _DTYPES[dtype],
        _DTYPES[out_dtype],
        laws.address,
        eps,
        n_power_iterations,
        workspace.data_ptr(),
        way,
        device.index,
        _stream(device),
    )
    _check(error, f"normalising {n} weights", device)


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
    n, device, dtype = len(layers), sigma.device, weights[0].dtype
    which = tuple(layers)
    table = _table(batch, which)
    if not table.addressable or not {dtype, grads[0].dtype} <= _DTYPES.keys():
        _instead("backward", device, batch, grads, weights, layers, laws, snapshot, sigma, grad_weights, grad_gains)
        return
    laws = laws.part(layers)
    sigmas = elements(sigma.data_ptr(), sigma.element_size(), which)
    pointers = addresses(picked(weights, layers), grads, grad_weights) + sigmas + addresses(laws.gains)
    way = _way()
    workspace = table.workspace(True, way, grads[0].dtype, device)
    error = extension.module.cuda_backward(
        table.address,
        n,
        pointers,
        snapshot.data_ptr(),
        _DTYPES[dtype],
        _DTYPES[grads[0].dtype],
        laws.address,
        0 if grad_gains is None else grad_gains.data_ptr(),
        workspace.data_ptr(),
        way,
        device.index,
        _stream(device),
    )
    _check(error, f"the gradients of {n} weights", device)
