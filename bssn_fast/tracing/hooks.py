"""What torch.compile and torch.export find in place of the bookkeeping of `modules`.

A compiler runs this code once, with tensors that hold no values yet, and what it learns from Python objects becomes a
condition for using the result again. So nothing that changes from step to step is read here: no versions of tensors, no
counters. What is written is what the code outside needs to know of the call.

Under torch.export there are plain torch operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import Tensor

from bssn_fast.calls import composite
from bssn_fast.calls.arguments import check_weight
from bssn_fast.calls.member import Member, gains_of
from bssn_fast.calls.plan import checked_vectors, partition
from bssn_fast.calls.serving import Entry
from bssn_fast.distributed.sharded import refuse_traced
from bssn_fast.layout import fits_kernels, result_dtype
from bssn_fast.tracing.node import in_transform, normalize
from bssn_fast.tracing.recording import (
    IN_TRANSFORM,
    Traced,
    has_iterated,
    is_exporting,
    iterated_in_torchs_block,
    note_in_torchs_block,
    traced_result,
)


class Layer(Member, Protocol):
    """A layer as recorded code sees it."""

    training: bool
    traced: Traced


class Published(Protocol):
    """Where a call's results lie for its layers to find."""

    published: list[Entry | None] | None
    recorded: bool


def begin(group: Published, members: Sequence[Any], weights: Sequence[Tensor]) -> None:
    """Normalise the layers of a model that is being called, and publish the results until `end`."""
    if group.recorded:  # of a call that an exception has ended: compiled code then runs no hooks
        group.published = None
    iterating = list(map(_iterates, members, weights))
    found: list[Entry | None] = [None] * len(members)
    mark = IN_TRANSFORM if in_transform() else -1
    for part in partition(members, weights, iterating):
        results = _normalize([members[j] for j in part], [weights[j] for j in part], iterate=iterating[part[0]])
        for j, normalized in zip(part, results, strict=True):
            found[j] = weights[j], mark, normalized, -1
    group.published, group.recorded = found, True


def end(group: Published, members: Sequence[Any]) -> None:
    """Withdraw what `begin` has published."""
    group.published, group.recorded = None, False
    for member in members:
        _finish(member)


def normalize_alone(member: Any, weight: Tensor) -> Tensor:
    """Return the normalised weight of a layer, of a call of its model or of this read alone."""
    if is_exporting():
        return _exported(member, weight)
    ready = traced_result(member, weight)
    if ready is not None:
        return ready
    (normalized,) = _normalize([member], [weight], iterate=_iterates(member, weight))
    _finish(member)
    return normalized


def _iterates(member: Layer, weight: Tensor) -> bool:
    """Whether a normalisation begins with power iterations: in training, the first of a call or a `cached` block."""
    if not member.training or (member.traced.in_block and member.traced.iterated) or iterated_in_torchs_block(member):
        return False
    return not has_iterated(member, weight)


def _finish(member: Layer) -> None:
    note_in_torchs_block(member)
    if member.traced.in_block:
        member.traced.iterated = True


def _normalize(members: list[Any], weights: list[Tensor], *, iterate: bool) -> list[Tensor]:
    """Normalise layers of one device, dtype and settings in one call."""
    for member, weight in zip(members, weights, strict=True):
        refuse_traced(weight, f"bssn_fast: {member.name}")
    n = members[0].settings.n_power_iterations if iterate else 0
    if in_transform() or not fits_kernels(weights[0], members[0].dim):
        return [composite.normalize(m, w, n)[0] for m, w in zip(members, weights, strict=True)]
    vectors = []
    for member, weight in zip(members, weights, strict=True):
        check_weight(weight, member.dim, f"bssn_fast: {member.name}")
        vectors += _vectors(member, weight)
        member.measured.sigma = None  # whoever asks for it computes it
    settings = members[0].settings
    *normalized, _ = normalize(
        weights,
        vectors,
        [m.dim for m in members],
        [m.two_sided for m in members],
        [m.settings.stack.n for m in members],
        [m.settings.stack.indexed for m in members],
        [law.kind for m in members for law in m.settings.laws()],
        [law.number for m in members for law in m.settings.laws()],
        gains_of(members),
        settings.eps,
        n,
        result_dtype(weights[0], members[0].autocast),
        settings.backend,
        settings.gradient_groups,
    )
    return normalized


def _vectors(member: Layer, weight: Tensor) -> list[Tensor]:
    vectors = [cast(Tensor, member._buffers[name]) for name in member.vector_names]
    checked = checked_vectors(member, vectors, weight)
    # Asked of the tensors: torch 2.11's compiler cannot tell whether two lists are the same.
    if any(new is not old for new, old in zip(checked, vectors, strict=True)):
        raise RuntimeError(
            f"bssn_fast: the weight of {member.name} has been moved or converted without its vectors. Call the model "
            "once without torch.compile, which moves them too"
        )
    return vectors


def _exported(member: Any, weight: Tensor) -> Tensor:
    if member.training:
        raise RuntimeError("bssn_fast: a model in training mode cannot be exported; call `model.eval()` first")
    return composite.normalize(member, weight, 0)[0]
