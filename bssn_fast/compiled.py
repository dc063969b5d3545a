"""What torch.compile and torch.export find in place of `group`'s and `parametrization`'s bookkeeping.

A compiler runs this code once, with tensors that hold no values yet, and what it learns from Python objects becomes a
condition for using the result again. So nothing that changes from step to step is read here: no versions of tensors, no
counters. What is written is what the code outside needs to know of the call.

A call of the operation is one node of the graph, whose inside (memory, autograd) is left to AOTAutograd: it sees that
the vectors change, and which layers get a gradient. Under torch.export there are plain torch operations instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._higher_order_ops.wrap import TagActivationCheckpoint
from torch.nn.utils.parametrize import ParametrizationList

from bssn_fast.functional import Normalizer, check_weight
from bssn_fast.layout import result_dtype, vector_sizes
from bssn_fast.parametrization import SpectralNormalization, Usage, original_of
from bssn_fast.plain import normalize_plainly
from bssn_fast.plan import checked_vectors, is_exporting, partition


@torch.compiler.allow_in_graph
def normalize(
    weights: list[Tensor],
    vectors: list[Tensor],
    dims: list[int],
    two_sided: list[bool],
    scale: float,
    eps: float,
    n_power_iterations: int,
    dtype: torch.dtype,
    backend: str,
    gradient_groups: int,
) -> tuple[Tensor, ...]:
    """Return the normalised weights, with a graph, and then sigma [n]; `Normalizer` documents the arguments."""
    if n_power_iterations and _in_checkpoint():
        raise RuntimeError(
            "bssn_fast: torch.utils.checkpoint around the normalisation of weights cannot be compiled, as the backward "
            "pass would iterate again and find other weights. Use it inside the module given to bssn_fast.apply, "
            "around parts of it, or leave the call of the checkpoint out of what is compiled"
        )
    normalizer = Normalizer(
        weights, dims, two_sided, scale=scale, eps=eps, backend=backend, gradient_groups=gradient_groups
    )
    values = normalizer.compute(weights, vectors, n_power_iterations, dtype)
    return (*normalizer.attach(values, weights), values.sigma)


def _in_checkpoint() -> bool:
    """Whether what Dynamo traces now will be repeated in the backward pass.

    Dynamo itself refuses this as soon as Python objects change, which is not always, and which
    `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint` allows.
    """
    try:
        tracer: Any = InstructionTranslator.current_tx().output.current_tracer
    except AttributeError:  # nothing is being traced
        return False
    while tracer is not None:
        if isinstance(tracer.source_target, TagActivationCheckpoint):
            return True
        tracer = tracer.parent
    return False


def begin(layers: Sequence[ParametrizationList], usage: Usage) -> None:
    """Normalise the layers of a model that is being called, and offer the results until `end`."""
    members, weights = _chosen(layers)
    iterating = [_iterates(m) for m in members]
    usage.note_compiled(iterated=any(iterating))
    for part in partition(members, weights, iterating):
        results = _normalize([members[j] for j in part], [weights[j] for j in part], iterate=iterating[part[0]])
        for j, normalized in zip(part, results, strict=True):
            members[j].state.ready = normalized


def end(layers: Sequence[ParametrizationList]) -> None:
    """Withdraw what `begin` has offered."""
    for member, weight in zip(*_chosen(layers), strict=True):
        _finish(member, weight)


def normalize_alone(member: SpectralNormalization, weight: Tensor) -> Tensor:
    """Return the normalised weight of a layer that is used outside a call of its model."""
    if is_exporting():
        return _exported(member, weight)
    iterate = _iterates(member)
    member.usage.note_compiled(iterated=iterate)
    (normalized,) = _normalize([member], [weight], iterate=iterate)
    _finish(member, weight)
    return normalized


def _chosen(layers: Sequence[ParametrizationList]) -> tuple[list[SpectralNormalization], list[Tensor]]:
    """Return the layers that a later `apply` or `remove` has left to their group, and their weights."""
    chosen = [(cast(SpectralNormalization, layer[0]), original_of(layer)) for layer in layers]
    chosen = [(member, weight) for member, weight in chosen if member.settings.update == "forward"]
    return [member for member, _ in chosen], [weight for _, weight in chosen]


def _iterates(member: SpectralNormalization) -> bool:
    """Whether a normalisation begins with power iterations: in training, the first one of a `cached` block."""
    return member.training and (member.state.cached == 0 or member.state.ready is None)


def _finish(member: SpectralNormalization, weight: Tensor) -> None:
    if member.state.cached == 0:
        member.state.withdraw()
    else:
        member.state.note_iteration(weight)


def _normalize(members: list[SpectralNormalization], weights: list[Tensor], *, iterate: bool) -> list[Tensor]:
    """Normalise layers of one device, dtype and settings in one call."""
    vectors = []
    for member, weight in zip(members, weights, strict=True):
        check_weight(weight, member.dim, "bssn_fast")
        vectors += _vectors(member, weight)
        member.state.sigma = None  # whoever asks for it computes it
    settings = members[0].settings
    *normalized, _ = normalize(
        weights,
        vectors,
        [m.dim for m in members],
        [m.two_sided for m in members],
        settings.scale,
        settings.eps,
        settings.n_power_iterations if iterate else 0,
        result_dtype(weights[0], members[0].autocast),
        settings.backend,
        settings.gradient_groups,
    )
    return normalized


def _vectors(member: SpectralNormalization, weight: Tensor) -> list[Tensor]:
    vectors = [cast(Tensor, member._buffers[name]) for name in member.vector_names]
    sizes = vector_sizes(weight.shape, member.dim, member.two_sided)
    checked = checked_vectors(vectors, weight, sizes)
    # Asked of the tensors: torch 2.11's compiler cannot tell whether two lists are the same.
    if any(new is not old for new, old in zip(checked, vectors, strict=True)):
        raise RuntimeError(
            "bssn_fast: a layer's weight has been moved or converted without its vectors. Call the model once without "
            "torch.compile, which moves them too"
        )
    return vectors


def _exported(member: SpectralNormalization, weight: Tensor) -> Tensor:
    if member.training:
        raise RuntimeError("bssn_fast: a model in training mode cannot be exported; call `model.eval()` first")
    return normalize_plainly(member, weight, iterate=False)
