"""Normalisation in plain torch operations, for those that take them apart: torch.func's transforms and exporters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bssn_fast import reference
from bssn_fast.layout import compute_dtype, result_dtype

if TYPE_CHECKING:
    from bssn_fast.plan import Member


def in_transform() -> bool:
    """Whether a transform of torch.func, such as `grad` or `vmap`, is being applied: its tensors have no addresses."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def normalize_plainly(member: Member, weight: Tensor, *, iterate: bool) -> Tensor:
    """Return the normalised weight by plain torch operations, for those that take them apart."""
    s, stored = member.settings, member.vectors(weight)
    vectors = tuple(v.clone() for v in stored)  # a graph keeps them
    if iterate:
        constant = weight.detach().to(compute_dtype(weight.dtype))  # no_grad would let forward-mode derivatives pass
        for _ in range(s.n_power_iterations):
            vectors = reference.power_iteration(constant, vectors, member.dim, s.eps)
        for old, new in zip(stored, vectors, strict=True):
            _write(old, new)
    normalized, _, _ = reference.normalize(weight, vectors, member.dim, scale=s.scale, eps=s.eps, n_power_iterations=0)
    member.state.sigma = None  # whoever asks for it computes it
    return normalized.to(result_dtype(weight, member.autocast))


def _write(old: Tensor, new: Tensor) -> None:
    """Write new vectors into those of a layer, in a transform of torch.func."""
    try:
        if torch._C._functorch.is_functorch_wrapped_tensor(old):  # an argument of what is transformed
            old.copy_(new)
        else:
            torch.add(new, 0, out=old)  # `copy_` is refused for tensors that are no arguments
    except RuntimeError as error:
        raise RuntimeError(
            "bssn_fast: torch.func.vmap over weights, in training, needs vectors for each of them: pass the buffers "
            "too, as torch.func.stack_module_state gives them, or call `model.eval()` first"
        ) from error
