"""Whether a result that is there is the one that is wanted now."""

from __future__ import annotations

import torch
from torch import Tensor

from bssn_fast.layout import result_dtype

Entry = tuple[Tensor, int, Tensor, int]
"""A weight and its result, each with its version."""


def leads_to(ready: Tensor, source: Tensor) -> bool:
    """Whether a result has a graph if one is wanted now."""
    return ready.requires_grad or not source.requires_grad or not torch.is_grad_enabled()


def serves(ready: Tensor, weight: Tensor) -> bool:
    """Whether a result has a graph if one is wanted now, and the dtype that is."""
    return (ready.requires_grad or not weight.requires_grad or not torch.is_grad_enabled()) and (
        # What was made for autocast is of no use where a model switches autocast off.
        ready.dtype is weight.dtype or ready.dtype == result_dtype(weight, True)
    )


def unless_frozen(ready: Tensor, weight: Tensor, gain: Tensor | None) -> Tensor:
    """Return a result, without its graph where neither the weight nor its gain is trained any more.

    So it is in the forward of a model that contains a whole GAN: it freezes the discriminator for the generator's loss,
    whose gradients must not come there.
    """
    if ready.requires_grad and not weight.requires_grad and (gain is None or not gain.requires_grad):
        return ready.detach()
    return ready


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether both are one weight, or views of all of it, as full backward hooks of modules hand it on."""
    if a is b:
        return True
    base, other = a._base, b._base
    return (a if base is None else base) is (b if other is None else other) and (
        (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())
    )
