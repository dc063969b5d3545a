"""Who does the arithmetic: one file per backend, each with the same four names.

`DEVICES`: the device types it serves; empty for all.

`why_unavailable() -> str | None`: None when it works here, else the reason with its remedy.

`forward(weights, vectors, dims, two_sided, scale, eps, n_power_iterations, normalized, snapshot, sigma) -> None`
normalises n layers of one device and dtype:

- `weights`: n dense tensors of fp64, fp32, bf16 or fp16, any strides. "Compute dtype" below is fp64 for fp64 weights
  and fp32 for all others; all arithmetic is done in it.
- `vectors`: the layers' persistent vectors one after another, contiguous, in the compute dtype: u_out [c_out],
  v_out [c_in k], and for two-sided layers u_in [c_in], v_in [c_out k]. Updated in place if n_power_iterations > 0.
- `dims`: 0 or 1 per layer, the output dimension. `two_sided`: per layer.
- `n_power_iterations`: 0 evaluates with the vectors as they are.
- `normalized`: n tensors to write, each with the shape and strides of its weight; their common dtype is the weights'
  or another floating dtype (autocast).
- `snapshot`: to write, flat, compute dtype: the vectors that sigma was computed with, at `layout.snapshot_offsets`.
- `sigma`: to write, [n], compute dtype.

`backward(grads, weights, layers, dims, two_sided, scale, snapshot, sigma, grad_weights) -> None` does so for the m <= n
layers whose indices are in `layers`:

- `grads`: m gradients of the normalised weights, strides of their weights, one common floating dtype.
- `weights`, `dims`, `two_sided`: of all n layers. `snapshot`, `sigma`: what the forward wrote.
- `grad_weights`: m tensors to write, shape, strides and dtype of their weights.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch

NAMES = ("reference", "cpu", "triton", "cuda")
_PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why and what to do."""


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"bssn_fast.backends.{name}")


def serves(name: str, device_type: str) -> bool:
    """Whether backend `name` is made for this type of device."""
    devices = _module(name).DEVICES
    return not devices or device_type in devices


def why_unavailable(name: str, device_type: str) -> str | None:
    """Return None if backend `name` works here for this type of device, else the reason."""
    if name not in NAMES:
        return f"there is no such backend; choose one of {', '.join(NAMES)}"
    if not serves(name, device_type):
        return f"it serves {' and '.join(_module(name).DEVICES)} tensors, not {device_type}"
    return _module(name).why_unavailable()


def default(device_type: str) -> str:
    """Return the name of the backend that a type of device gets when none is asked for."""
    return os.environ.get("BSSN_FAST_BACKEND") or _first_available(device_type)


@cache
def _first_available(device_type: str) -> str:
    candidates = _PREFERRED.get(device_type, ("reference",))
    return next(name for name in candidates if why_unavailable(name, device_type) is None)


@cache
def _resolve(name: str, device_type: str) -> ModuleType:
    reason = why_unavailable(name, device_type)
    if reason is not None:
        raise BackendUnavailableError(f"bssn_fast backend {name!r} cannot be used: {reason}")
    return _module(name)


def get(name: str, device: torch.device) -> ModuleType:
    """Return the backend `name` for a device; an empty name takes BSSN_FAST_BACKEND or the device's default.

    Raises BackendUnavailableError if the one asked for cannot run here.
    """
    return _resolve(name or default(device.type), device.type)
