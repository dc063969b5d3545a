"""Gradients that a backward pass is given: whether kernels can read them, and in which layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bssn_fast.calls.composite import has_tangents
from bssn_fast.layout import is_plain, same_strides


def all_plain(grads: Sequence[Tensor]) -> bool:
    """Whether gradients are for certain what their memory says; `is_plain` tells of each, and takes longer."""
    return {Tensor}.issuperset(map(type, grads)) and not (
        any(map(Tensor.is_neg, grads)) or any(map(torch._is_zerotensor, grads))
    )


def have_memory(grads: Sequence[Tensor | None]) -> bool:
    """Whether kernels can read the gradients: not where vmap runs a backward pass for many of them at a time."""
    given = [g for g in grads if g is not None]
    return all(map(torch._C._has_storage, given)) and not has_tangents(given)


def without_sparse(grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return the gradients without sparse ones, as `torch.nn.functional.embedding` gives them when it is told to.

    The gradient of a weight that is divided by its norm is dense in any case.
    """
    if all([g is None or g.layout is torch.strided for g in grads]):
        return grads
    return [g if g is None else g.to_dense() for g in grads]


def like(grad: Tensor | None, gain: Tensor) -> Tensor | None:
    """Return a gain's gradient in its dtype and on its device."""
    return None if grad is None else grad.to(gain.device, gain.dtype).reshape(gain.shape)


def with_strides(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient laid out in memory as its weight is."""
    if same_strides(grad, weight) and is_plain(grad):
        return grad
    return torch.empty_strided(weight.shape, weight.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)
