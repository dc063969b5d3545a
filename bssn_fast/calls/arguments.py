"""What is asked of arguments before anything changes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_COMPLEX = (torch.complex64, torch.complex128)


def check_module(model: object, function: str) -> None:
    """Raise TypeError for what is no module, a state_dict or a class for instance."""
    if not isinstance(model, torch.nn.Module):
        found = f"the class {model.__name__}; make one first" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"bssn_fast.{function} needs a torch.nn.Module, the model or a layer, not {found}")


def check_weight(weight: Tensor, dim: int, name: str) -> None:
    """Raise ValueError or TypeError, naming the layer and the remedy, for a weight that cannot be normalised.

    Of the others, kernels can only take those of which `layout.fits_kernels` says so.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: a weight must be a tensor, not {type(weight).__name__}")
    if isinstance(weight, torch.nn.UninitializedParameter):
        raise ValueError(f"{name}: the weight is not initialised yet; run one forward of the lazy module first")
    if weight.dtype not in WEIGHT_DTYPES + _COMPLEX:
        raise TypeError(
            f"{name}: weights of {weight.dtype} cannot be normalised; "
            "convert the layer to float32, float64, bfloat16, float16, complex64 or complex128, or leave it out"
        )
    if weight.layout != torch.strided:
        raise TypeError(f"{name}: the weight is {weight.layout}; convert it with `to_dense()` or leave the layer out")
    if weight.ndim < 1:
        raise ValueError(f"{name}: a weight of no dimensions has no spectral norm; leave the layer out")
    if weight.numel() == 0:
        raise ValueError(f"{name}: the weight of shape {tuple(weight.shape)} is empty; leave the layer out")
    if not 0 <= whole_number(dim) < weight.ndim:
        raise ValueError(f"{name}: the output dimension must be from 0 to {weight.ndim - 1}, not {dim!r}")


def refuse_trained(value: object, name: str) -> None:
    """Raise TypeError for a tensor that requires a gradient where a number is wanted."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name} is a constant and would not be trained; give a number. `gain` is for what is learned, or multiply "
            "the layer's output by a Parameter of your own"
        )


def check_settings(eps: object, n_power_iterations: object, *, fewest: int = 0) -> tuple[float, int]:
    """Return the settings as numbers of Python; raise ValueError if they are none, or out of range."""
    n = whole_number(n_power_iterations)
    if n < fewest:
        raise ValueError(f"n_power_iterations must be a whole number of at least {fewest}, not {n_power_iterations!r}")
    return positive(eps, "eps"), n


def positive(value: Any, name: str) -> float:
    """Return a number of Python; raise ValueError if it is none, or not positive and finite."""
    try:
        number = -1.0 if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: of a tensor of several elements, or without values
        number = -1.0
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} must be a positive finite number, not {value!r}")
    return number


def whole_number(value: Any) -> int:
    """Return an int, also of a NumPy integer; -1 for what is no whole number."""
    try:
        return -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return -1
