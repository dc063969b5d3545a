"""Whether tensors are, but for their values and addresses, what they were: one question to torch for a whole list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from bssn_fast.calls.composite import has_tangents, wants_plain_operations


class Guard:
    """Holds for tensors that kernels can read, each like the one in its place that the guard was made with.

    Alike are the class, dtype, device, sizes, strides, requires_grad, and all that dispatch keys tell: whether the
    tensor is fake, has a negative bit, or belongs to a transform of torch.func. The thread's own keys count too, such
    as those of autocast and of transforms. So a guard may fail without need, and never holds without reason.

    It is what torch.compile uses to ask whether compiled code still fits.
    """

    __slots__ = ("_check", "_size")

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        """Without tensors, or for those that kernels cannot read, the guard never holds."""
        self._size = len(tensors)
        self._check = None
        if tensors and not wants_plain_operations(tensors) and not any(map(Tensor.is_neg, tensors)):
            sizes: list[Any] = [list(t.shape) for t in tensors]
            strides: list[Any] = [list(t.stride()) for t in tensors]
            self._check = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check

    def holds(self, tensors: Sequence[Any]) -> bool:
        """Whether all of them are alike; what is no tensor is like none."""
        return (
            self._check is not None
            and len(tensors) == self._size
            and self._check(*tensors)
            and not has_tangents(tensors)  # dual tensors have no key
            and torch._C._len_torch_dispatch_stack() == 0  # nor have modes that fake tensors
        )
