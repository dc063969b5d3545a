"""The CUDA C++ kernels of csrc/cuda: one launch forward, one backward, on NVIDIA GPUs, with neither Triton nor nvcc.

BSSN_FAST_CUDA_LAUNCH=single runs all phases in one launch, in which tiles wait for those they build on (the default);
BSSN_FAST_CUDA_LAUNCH=phases starts one launch per phase. With several power iterations, each is a launch of its own.

A call with weights that the kernels do not address (fp64, 2^31 elements or more, none at all, kernel dimensions that do
not form one stride) is computed by the reference.
"""

from __future__ import annotations

import os
from array import array
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from bssn_fast.backends import extension, reference
from bssn_fast.backends.cpu import _DTYPES, _kernel_offsets, _Table, _table

DEVICES = ("cuda",)

single_launch = os.environ.get("BSSN_FAST_CUDA_LAUNCH", "single") == "single"


def why_unavailable() -> str | None:
    if extension.module is None:
        return extension.why_missing()
    if not hasattr(extension.module, "cuda_forward"):
        reason = importlib_build_info().get("cuda", "nvcc was not found")
        return f"the extension was built without CUDA: {reason}"
    if not torch.cuda.is_available() or torch.version.hip:
        return "torch sees no NVIDIA GPU; check the driver and that torch was installed with CUDA"
    error = extension.module.cuda_status(torch.cuda.current_device())
    return None if error == 0 else f"CUDA says '{_words(error)}'; {_REMEDY}"


_REMEDY = (
    "a newer driver, or a build with this machine's CUDA toolkit for this GPU (BSSN_FAST_CUDA_ARCHS), "
    "e.g. BSSN_FAST_CUDA_ARCHS=90 pip install --force-reinstall --no-deps .; may help"
)


def importlib_build_info() -> dict[str, str]:
    """Return what setup.py noted down about backends that it did not build."""
    try:
        from bssn_fast._build_info import NOT_BUILT
    except ImportError:
        return {}
    return NOT_BUILT


def _words(error: int) -> str:
    words: str = extension.module.cuda_error_string(error)
    return words


def _check(error: int, what: str, device: torch.device) -> None:
    if error:
        raise RuntimeError(f"bssn_fast: {what} on {device} failed: CUDA says '{_words(error)}' (error {error})")


@lru_cache(maxsize=256)
def _addressable(shapes: tuple[tuple[int, ...], ...], strides: tuple[tuple[int, ...], ...]) -> bool:
    """Whether the kernels can find their way through all these weights."""
    for shape, stride in zip(shapes, strides, strict=True):
        offsets = _kernel_offsets(shape, stride)
        step = offsets[1] if len(offsets) > 1 else 1
        if not 0 < prod(shape) < 2**31 or offsets != array("q", range(0, len(offsets) * step, step)):
            return False
    return True


@lru_cache(maxsize=256)
def _workspace_bytes(table: _Table, n: int, forward: bool, dtype: torch.dtype, device: torch.device) -> int:
    if forward:
        size: int = extension.module.cuda_forward_workspace(table.address, n, _DTYPES[dtype], device.index)
    else:
        size = extension.module.cuda_backward_workspace(table.address, n, device.index)
    _check(max(-size, 0), "asking for the limits", device)
    return size


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


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
    shapes, strides = tuple([w.shape for w in weights]), tuple([w.stride() for w in weights])
    if sigma.dtype == torch.float64 or not _addressable(shapes, strides):
        reference.forward(
            weights, vectors, dims, two_sided, scale, eps, n_power_iterations, normalized, snapshot, sigma
        )
        return
    n, device, dtype = len(weights), sigma.device, weights[0].dtype
    table = _table(shapes, strides, tuple(dims), tuple(two_sided))
    pointers = array("q", [x.data_ptr() for x in (*weights, *normalized, *vectors)])
    size = _workspace_bytes(table, n, True, dtype, device)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    error = extension.module.cuda_forward(
        table.address,
        n,
        pointers.buffer_info()[0],
        snapshot.data_ptr(),
        sigma.data_ptr(),
        _DTYPES[dtype],
        _DTYPES[normalized[0].dtype],
        scale,
        eps,
        n_power_iterations,
        workspace.data_ptr(),
        single_launch,
        device.index,
        _stream(device),
    )
    _check(error, f"normalising {n} weights", device)


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
    shapes, strides = tuple([w.shape for w in weights]), tuple([w.stride() for w in weights])
    if sigma.dtype == torch.float64 or grads[0].dtype == torch.float64 or not _addressable(shapes, strides):
        reference.backward(grads, weights, layers, dims, two_sided, scale, snapshot, sigma, grad_weights)
        return
    n, device, dtype = len(layers), sigma.device, weights[0].dtype
    table = _table(shapes, strides, tuple(dims), tuple(two_sided), tuple(layers))
    pointers = array("q", [weights[j].data_ptr() for j in layers])
    pointers.extend([x.data_ptr() for x in (*grads, *grad_weights)])
    first, element = sigma.data_ptr(), sigma.element_size()
    pointers.extend([first + element * j for j in layers])
    size = _workspace_bytes(table, n, False, dtype, device)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    error = extension.module.cuda_backward(
        table.address,
        n,
        pointers.buffer_info()[0],
        snapshot.data_ptr(),
        _DTYPES[dtype],
        _DTYPES[grads[0].dtype],
        scale,
        workspace.data_ptr(),
        single_launch,
        device.index,
        _stream(device),
    )
    _check(error, f"the gradients of {n} weights", device)
