"""Normalisation in plain torch operations.

For tensors that have no memory of their own, for those who record, and for weights that there are no kernels for.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from types import FrameType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils import stateless

from bssn_fast import reference
from bssn_fast.calls.hooks import past_hooks
from bssn_fast.calls.member import Measured, Member
from bssn_fast.laws import AT_MOST
from bssn_fast.layout import PLAIN_CLASSES, compute_dtype, has_tangent, result_dtype

_FUNCTIONAL_CALL = stateless._functional_call.__code__
_MODES = tuple(torch._C._TorchDispatchModeKey.__members__.values())  # of fake tensors, of recording, functional


def in_transform() -> bool:
    """Whether a transform of torch.func, such as `grad` or `vmap`, is being applied."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_mode() -> bool:
    """Whether operations, also those on real tensors, give fake tensors or are recorded, as by `make_fx`."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(torch._C._get_dispatch_mode(key) is not None for key in _MODES)


def in_fake_mode() -> bool:
    """Whether FakeTensorMode is active: what operations return has no values then."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def is_temporary() -> bool:
    """Whether results mean something only as long as a transform or a mode is there."""
    return in_transform() or in_mode()


def in_functional_call() -> bool:
    """Whether torch.func.functional_call has put other tensors in the place of a module's own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _FUNCTIONAL_CALL:
        frame = frame.f_back
    return frame is not None


def has_tangents(tensors: Iterable[Tensor]) -> bool:
    """Whether forward-mode derivatives with respect to one of the tensors are wanted."""
    return forward_ad._current_level >= 0 and any(map(has_tangent, tensors))  # at once where there are no levels


def wants_plain_operations(weights: Sequence[Tensor]) -> bool:
    """Whether kernels cannot read these weights, or who follows the computation could not see what they do.

    So it is with tensors of torch.func's transforms, dual tensors, those of the meta device, fake ones and other
    subclasses of Tensor, and with all tensors where a mode makes fake ones of them or records.
    """
    return (
        is_temporary()
        or not PLAIN_CLASSES.issuperset(map(type, weights))
        or weights[0].device.type == "meta"
        or has_tangents(weights)
    )


def normalize(
    member: Member, weight: Tensor, n_power_iterations: int, vectors: Sequence[Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the normalised weight by plain torch operations, and the vectors that it was made with.

    vectors: to use in place of the layer's own, which then stay as they are; without iterations.
    """
    s, stack, stored = member.settings, member.settings.stack, member.vectors(weight)
    used = [v.clone() for v in stored] if vectors is None else list(vectors)  # a graph keeps them
    if n_power_iterations and used:
        constant = weight.detach().to(compute_dtype(weight.dtype))  # no_grad would let forward-mode derivatives pass
        for _ in range(n_power_iterations):
            pairs = stack.each(constant, used)
            used = stack.join_vectors([reference.power_iteration(w, own, member.dim, s.eps) for w, own in pairs])
        for old, new in zip(stored, used, strict=True):
            write(old, new)
    numbers: Sequence[float | Tensor] = [law.number for law in s.laws()]
    if member.gain is not None:
        numbers = member.gain.to(used[0].real.dtype if used else member.gain.dtype).split(1)
    with contextlib.nullcontext() if torch.compiler.is_compiling() or in_transform() else past_hooks():
        found = [
            reference.normalize(w, own, member.dim, scale=c, at_most=s.kind == AT_MOST, eps=s.eps, n_power_iterations=0)
            for (w, own), c in zip(stack.each(weight, used), numbers, strict=True)
        ]
        normalized = stack.join([part for part, _, _ in found]).to(result_dtype(weight, member.autocast))
    member.measured.sigma = None  # whoever asks for it computes it
    if not torch.compiler.is_compiling() and not wants_plain_operations([weight]):
        sigma = torch.stack([sigma.detach().abs() for _, _, sigma in found])
        member.measured.sigma, member.measured.index = sigma, Measured.at(0, stack)
    return normalized, tuple(used)


def write(old: Tensor, new: Tensor) -> None:
    """Write a new vector into the stored one, also in transforms of torch.func."""
    if not in_transform():
        with torch.no_grad():
            old.copy_(new)
        return
    try:
        if torch._C._functorch.is_functorch_wrapped_tensor(old):  # an argument of what is transformed
            old.copy_(new)
        else:
            torch.add(new, 0, out=old)  # `copy_` is refused for tensors that are no arguments
    except RuntimeError as error:
        raise RuntimeError(
            "bssn_fast: torch.func.vmap over weights, in training, needs vectors for each of them: pass the buffers "
            "too, as torch.func.stack_module_state gives them, or do without power iterations: call `model.eval()` "
            "first, or give `bssn_fast.normalize` n_power_iterations=0"
        ) from error
