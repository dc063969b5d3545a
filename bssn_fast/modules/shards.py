"""Layers whose weights FSDP gathers in the course of a model's call: what their shards tell before.

Such layers are normalised by the submodule that gathers their weights. Sigma can be known by then: from sums over the
ranks of what each shard gives, for all layers together when the model's call begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from typing import Any, NamedTuple

from torch import Tensor

from bssn_fast.calls.plan import partition, signature
from bssn_fast.calls.sharded import Found, ShardedPlan
from bssn_fast.distributed.sharded import is_sharded
from bssn_fast.layout import ONE
from bssn_fast.modules.lists import original_of
from bssn_fast.modules.parametrization import SpectralNormalization


class Known(NamedTuple):
    """One layer's vectors and sigma in a call of the model."""

    vectors: tuple[Tensor, ...]
    sigma: Tensor


def wants_reduction(norm: SpectralNormalization, weight: Tensor) -> bool:
    """Whether sigma of a sharded weight is to be found before it is gathered.

    Gathered weights cost nothing but arithmetic, as they are gathered anyway: so they are normalised whole, unless they
    are parts again, of tensor parallelism. Then every submodule would send messages of its own.
    """
    how = norm.settings.sharded
    return (
        is_sharded(weight)
        and norm.settings.stack == ONE
        and (how == "reduce" or (how == "auto" and bool(norm.placements)))
    )


class Shards:
    """Finds sigma of layers from the shards of their weights, in the same messages for all.

    groups: of the submodules that gather the weights, `group.Group`.
    """

    def __init__(self) -> None:
        self.groups: list[Any] = []
        self._key: object = None
        self._plans: list[tuple[ShardedPlan, list[int]]] = []

    def __getstate__(self) -> dict[str, Any]:  # a copy makes its plans anew
        return {"groups": self.groups, "_key": None, "_plans": []}

    def measure(self) -> dict[int, Known]:
        """Return what was found for each layer, by id, after the power iterations of those in training."""
        layers = [(layer[0], original_of(layer)) for group in self.groups for layer in group.layers()]
        layers = [(norm, weight) for norm, weight in layers if wants_reduction(norm, weight)]
        norms, weights = [norm for norm, _ in layers], [weight for _, weight in layers]
        training = [norm.training for norm in norms]
        key = (norms, signature(weights), training, [norm.settings for norm in norms])
        if key != self._key:
            parts = partition(norms, weights, training)
            self._plans = [
                (ShardedPlan([norms[j] for j in part], [weights[j] for j in part], gathered=False), part)
                for part in parts
            ]
            self._key = key
        found: dict[int, Known] = {}
        for plan, part in self._plans:
            vectors, sigma = plan.measure([weights[j] for j in part], iterate=training[part[0]])
            found.update((id(norms[j]), Known(v, s)) for j, v, s in zip(part, vectors, sigma, strict=True))
        return found


def found_for(group: Any, norms: Sequence[SpectralNormalization]) -> Found | None:
    """Return what the group's running call has found for these layers, if it has for all of them."""
    call = group.calls.get(get_ident())
    known: dict[int, Known] = call.measured if call is not None and call.measured and call.running() else {}
    found = [known[id(norm)] for norm in norms if id(norm) in known]
    return Found([k.vectors for k in found], [k.sigma for k in found]) if len(found) == len(norms) else None
