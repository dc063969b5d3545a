"""Hooks for saved tensors: those of torch.utils.checkpoint tell what is going on, and none must see the weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_top: Callable[[bool], tuple[Any, ...] | None] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)


innermost: Callable[[], tuple[Any, ...] | None] = tuple if _top is None else functools.partial(_top, True)
"""Return the hooks (pack, unpack) of what is saved now; None without any; () where torch < 2.8 is silent."""


def past_hooks() -> contextlib.AbstractContextManager[None]:
    """Keep hooks for saved tensors away from the weights.

    They are parameters: there is nothing to offload. And torch.utils.checkpoint counts what is saved in the forward and
    again in the recomputation, where a model call's normalisation is not repeated.
    """
    if innermost() is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_with_version, _unchanged)


def _with_version(x: Tensor) -> tuple[Tensor, int]:
    return x, x._version


def _unchanged(kept: tuple[Tensor, int]) -> Tensor:
    """Return what was saved. torch, which compares the versions of what it saves, does not where there are hooks."""
    x, version = kept
    if x._version != version:
        raise RuntimeError(
            "bssn_fast: a variable needed for gradient computation has been modified by an inplace operation: "
            f"it has shape {tuple(x.shape)} and version {x._version}, expected version {version}. Run the backward "
            "pass before changing weights"
        )
    return x
