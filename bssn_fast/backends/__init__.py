"""Who does the arithmetic: one file per backend, each with the same four names.

`DEVICES`: the device types it serves; empty for all.

`why_unavailable(device) -> str | None`: None when it works on this device, else the reason with its remedy. Asked once
per device, so that it may take its time: to compile and load a kernel, for instance.

`forward(batch, weights, vectors, laws, eps, n_power_iterations, normalized, snapshot, sigma) -> None` normalises n
layers of one device and dtype:

- `batch`: the layers' geometry, `layout.Batch`: shapes, strides, output dimensions, which of them are two-sided.
- `weights`: n dense tensors of fp64, fp32, bf16 or fp16, any strides. "Compute dtype" below is fp64 for fp64 weights
  and fp32 for all others; all arithmetic is done in it.
- `vectors`: the layers' persistent vectors one after another, contiguous, in the compute dtype: u_out [c_out],
  v_out [c_in k], and for two-sided layers u_in [c_in], v_in [c_out k]. Updated in place if n_power_iterations > 0.
- `laws`: of the n weights, `laws.Laws`, with the tensors of gains.
- `n_power_iterations`: 0 evaluates with the vectors as they are.
- `normalized`: n tensors to write, each with the shape and strides of its weight; their common dtype is the weights'
  or another floating dtype (autocast). They may be the weights themselves; with none at all, sigma is only measured.
  Calls go fastest if they, and `grad_weights` below, lie in one buffer each: what
  is prepared for one call then serves the next.
- `snapshot`: to write, flat, compute dtype: the vectors that sigma was computed with, at `batch.snapshot_offsets`.
- `sigma`: to write, [n], compute dtype.

`backward(batch, grads, weights, layers, laws, snapshot, sigma, grad_weights, grad_gains) -> None` does so for the
m <= n layers whose indices are in `layers`:

- `grads`: m gradients of the normalised weights, strides of their weights, one common floating dtype.
- `batch`, `weights`, `laws`: of all n layers.
- `snapshot`, `sigma`: what the forward, of this or another backend, wrote.
- `grad_weights`: m tensors to write, shape, strides and dtype of their weights.
- `grad_gains`: to write, compute dtype: one number for each of the m layers whose law is a gain, in order of `layers`;
  None where there are none.

Both may raise BackendUnavailableError for a call that they cannot serve after all, before they have written anything.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType
from typing import Any, Literal, get_args

import torch

from bssn_fast.backends.environment import environment

Backend = Literal["", "reference", "cpu", "triton", "cuda"]
"""Who does the arithmetic; "" leaves the choice to the device's default."""

NAMES: tuple[str, ...] = get_args(Backend)[1:]
# Of the two for GPUs, first the one that compiles nothing at the first call and was the faster on large models.
_PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


given_up: dict[tuple[str, torch.device], str] = {}
"""Why a backend is no device's default any more, although it seemed to work there."""


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why and what to do."""


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"bssn_fast.backends.{name}")


def serves(name: str, device_type: str) -> bool:
    """Whether backend `name` is made for this type of device."""
    devices = _module(name).DEVICES
    return not devices or device_type in devices


def _with_index(device: torch.device | str) -> torch.device:
    """Return the device with its number: "cuda" alone is the current one, which may change."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return device


@cache
def _why_unavailable(name: str, device: torch.device) -> str | None:
    return _module(name).why_unavailable(device)


def why_unavailable(name: str, device: torch.device | str) -> str | None:
    """Return None if backend `name` works on this device, else the reason."""
    device = _with_index(device)
    if name not in NAMES:
        return f"there is no such backend; choose one of {', '.join(NAMES)}"
    if not serves(name, device.type):
        return f"it serves {' and '.join(_module(name).DEVICES)} tensors, not {device.type}"
    return _why_unavailable(name, device)


def default(device: torch.device | str) -> str:
    """Return the name of the backend that a device gets when none is asked for."""
    return environment("BSSN_FAST_BACKEND") or _first_available(_with_index(device))


@cache
def _first_available(device: torch.device) -> str:
    """Return the first backend that works on a device; decided once for each device."""
    reasons, gave_way = [], False
    for name in _PREFERRED.get(device.type, ("reference",)):
        known = given_up.get((name, device))
        reason = known or why_unavailable(name, device)
        if reason is None:
            break
        reasons.append(known or f"{name}: {reason}")
        gave_way |= known is not None
    is_there = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
    if name == "reference" and is_there and not (gave_way and device.type == "cpu"):
        warnings.warn(
            f"bssn_fast has no kernels that work on {device} and uses plain torch operations, which are slower. "
            f"{'; '.join(reasons)}. BSSN_FAST_BACKEND=reference chooses them without this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
    elif gave_way:
        warnings.warn(
            f"{'; '.join(reasons)}. From now on {name!r} computes there; backend={name!r} or BSSN_FAST_BACKEND={name} "
            "chooses it from the start, without this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
    return name


def forget() -> None:
    """Decide anew, for all devices, which backends work."""
    given_up.clear()
    for decided in (_why_unavailable, _first_available, _resolve):
        decided.cache_clear()


@cache
def _resolve(name: str, device: torch.device) -> ModuleType:
    reason = why_unavailable(name, device)
    if reason is not None:
        raise BackendUnavailableError(f"bssn_fast backend {name!r} cannot be used on {device}: {reason}")
    return _module(name)


def get(name: str, device: torch.device) -> ModuleType:
    """Return the backend `name` for a device; an empty name takes BSSN_FAST_BACKEND or the device's default.

    Raises BackendUnavailableError if the one asked for cannot run there.
    """
    return _resolve(name or default(device), device)


def run(operation: str, name: str, device: torch.device, *args: Any) -> None:
    """Call `forward` or `backward` of the backend that `get` returns.

    A device's default that proves unable to serve a call gives way, from now on, to the next one, with a warning. One
    that was asked for does not: what it raises is raised.
    """
    while True:
        # As `default` does it, less what a tensor's device, always with a number, does not need.
        chosen = name or environment("BSSN_FAST_BACKEND") or _first_available(device)
        try:
            getattr(_resolve(chosen, device), operation)(*args)
            return
        except BackendUnavailableError as error:
            if name or environment("BSSN_FAST_BACKEND"):
                raise
            given_up.setdefault((chosen, device), str(error))
            _first_available.cache_clear()
