"""Hooks for saved tensors: those of torch.utils.checkpoint tell what is going on, and none must see the weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

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
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
