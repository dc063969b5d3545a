"""What is asked of arguments before anything changes."""

from __future__ import annotations

import operator
from typing import SupportsIndex

import torch
from torch import Tensor

from bssn_fast.distributed.sharded import refuse_sharded

WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_weight(weight: Tensor, dim: int, name: str) -> None:
    """Raise ValueError or TypeError, naming the layer and the remedy, for a weight that cannot be normalised."""
    if isinstance(weight, torch.nn.UninitializedParameter):
        raise ValueError(f"{name}: the weight is not initialised yet; run one forward of the lazy module first")
    refuse_sharded(weight, name)
    if weight.dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"{name}: weights of {weight.dtype} cannot be normalised; "
            "convert the layer to float32, float64, bfloat16 or float16, or leave it out"
        )
    if weight.layout != torch.strided:
        raise TypeError(f"{name}: the weight is {weight.layout}; convert it with `to_dense()` or leave the layer out")
    if weight.ndim < 2:
        raise ValueError(f"{name}: a weight of {weight.ndim} dimension(s) has no spectral norm; leave the layer out")
    if weight.numel() == 0:
        raise ValueError(f"{name}: the weight of shape {tuple(weight.shape)} is empty; leave the layer out")
    if dim not in (0, 1):
        raise ValueError(f"{name}: the output dimension must be 0 or 1, not {dim}")


def check_settings(scale: float, eps: float, n_power_iterations: SupportsIndex, *, fewest: int = 0) -> None:
    """Raise ValueError or TypeError for settings out of range."""
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise TypeError(
            "scale is a constant and would not be trained; give a number, and multiply the layer's output by a "
            "Parameter of your own"
        )
    if not (0 < scale < float("inf")):
        raise ValueError(f"scale must be a positive finite number, not {scale}")
    if not (0 < eps < float("inf")):
        raise ValueError(f"eps must be a positive finite number, not {eps}; the default is 1e-12")
    if whole_number(n_power_iterations) < fewest:
        raise ValueError(f"n_power_iterations must be a whole number of at least {fewest}, not {n_power_iterations!r}")


def whole_number(value: SupportsIndex) -> int:
    """Return an int, also of a NumPy integer; -1 for what is no whole number."""
    try:
        return -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return -1
