"""Weights that stay sharded (DTensors) are normalised where they lie: products of parts, and sums over the ranks.

All ranks make the same calls in the same order. So nothing here is decided by what one rank alone has seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bssn_fast import reference
from bssn_fast.calls.arguments import check_weight
from bssn_fast.calls.contents import version
from bssn_fast.calls.estimation import (
    BELONGING,
    STILL_BELONGING,
    are_units,
    start_vectors,
    until_it_stands_still,
    write,
)
from bssn_fast.calls.hooks import past_hooks
from bssn_fast.calls.member import Member
from bssn_fast.calls.plan import Plan, Results, check_memory, signature
from bssn_fast.distributed.iteration import Layer, Layers, Vectors
from bssn_fast.distributed.parts import Part
from bssn_fast.distributed.sharded import (
    is_managed,
    is_sharded,
    layout_of,
    like,
    local_of,
    placements_of,
    refuse_gain,
    refuse_stack,
    refuse_unfit,
    refuse_ungathered,
)
from bssn_fast.laws import AT_MOST, GAIN
from bssn_fast.layout import ONE, compute_dtype, result_dtype


def refuse_gains(members: Iterable[Member]) -> None:
    """Raise TypeError for sharded weights that have a learned gain."""
    for m in members:
        if m.settings.kind == GAIN:
            refuse_gain(f"bssn_fast: {m.name}")


def plan_for(members: Sequence[Member], weights: Sequence[Tensor]) -> Plan | ShardedPlan:
    """Return a plan for members that `partition` has put together."""
    return ShardedPlan(members, weights) if is_sharded(weights[0]) else Plan(members, weights)


def estimate_sharded(member: Member, weight: Tensor, hints: Sequence[Tensor | None]) -> Vectors:
    """Return vectors of a sharded weight that is to become the member's, as `estimation.estimate_vectors` does."""
    return ShardedPlan([member], [weight], gathered=False).estimated_alone(weight, hints)


class Found(NamedTuple):
    """What normalising needs beside the weights: each layer's vectors, which nobody else writes into, and sigma."""

    vectors: list[Vectors]
    sigma: list[Tensor]


class ShardedPlan:
    """Normalises members whose weights are DTensors, of any meshes, dtypes and settings but the number of iterations.

    As `Plan`, but nothing is kept from one call to the next: whether it still holds, ranks might answer differently.
    """

    learned = False  # no gains

    def __init__(self, members: Sequence[Member], weights: Sequence[Tensor], *, gathered: bool = True) -> None:
        self.members, self.settings = list(members), members[0].settings
        self._signature = signature(weights)
        self._gathered = gathered
        self._unchecked = True
        self._seen: list[tuple[int, list[int]]] = []  # versions of each layer's weight and vectors, as last evaluated
        self._lay_out(weights)

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Whether the plan is for such weights; where their parts lie is looked at in each call."""
        return self._signature == signature(weights)

    def forget(self) -> None:
        """Do nothing, as nothing is kept."""

    def _lay_out(self, weights: Sequence[Tensor]) -> None:
        """Find out which parts of the weights this rank has; raise what speaks against normalising one of them."""
        refuse_gains(self.members)
        for m, w in zip(self.members, weights, strict=True):
            name = f"bssn_fast: {m.name}"
            check_weight(w, m.dim, name)
            refuse_unfit(w, name)
            if self._gathered:
                refuse_ungathered(w, m, name)
                if not is_managed(m):
                    m.placements = placements_of(w)
            if m.settings.stack != ONE:
                refuse_stack(name)
        self._layers = [
            Layer(Part(w), m.dim, m.two_sided, m.settings.eps) for m, w in zip(self.members, weights, strict=True)
        ]
        self._dtypes = [compute_dtype(w.dtype) for w in weights]
        self._all = Layers(self._layers, self._dtypes)
        self._layouts = list(map(layout_of, weights))

    def normalize(
        self,
        weights: Sequence[Tensor],
        *,
        iterate: bool,
        keep: bool = False,
        protect: bool = False,
        readable: bool = False,
        vectors: Sequence[Sequence[Tensor]] | None = None,
    ) -> Results:
        """Return the normalised weights as DTensors that are sharded alike; the arguments are `Plan.normalize`'s.

        Training sends two messages for each power iteration, evaluation one, the backward pass one.
        """
        return self.scale(weights, *self.measure(weights, iterate=iterate, vectors=vectors))

    @torch.no_grad()
    def measure(
        self, weights: Sequence[Tensor], *, iterate: bool, vectors: Sequence[Sequence[Tensor]] | None = None
    ) -> Found:
        """Return the vectors, after the members' power iterations if they are wanted, and sigma."""
        if self._layouts != list(map(layout_of, weights)):
            self._lay_out(weights)
        locals_ = self._locals(weights)
        if vectors is not None:
            used = [tuple(v) for v in vectors]
            return Found(used, self._means(self._all.evaluate(locals_, used)[0]))
        own, failure = self._own_vectors(weights)
        if self._unchecked:
            self._begin(weights, locals_, own, failure, iterate)
            self._unchecked = False
        if iterate:
            used, sides = self._all.iterate(locals_, own, self.settings.n_power_iterations, failure)
            for stored, new in zip(own, used, strict=True):
                write(stored, new)
        else:
            sides = self._evaluate(weights, locals_, own, failure)
            used = [tuple(v.clone() for v in stored) for stored in own]  # a graph keeps them
        found = Found(used, self._means(sides))
        for m, sigma in zip(self.members, found.sigma, strict=True):
            m.measured.sigma, m.measured.index = sigma[None], 0
        return found

    def scale(self, weights: Sequence[Tensor], vectors: Sequence[Vectors], sigma: Sequence[Tensor]) -> Results:
        """Return the normalised weights, with a graph if one is wanted, of vectors and sigma [] that are known."""
        found = Found(list(vectors), list(sigma))
        call = _Call(self._all, [layer.part for layer in self._layers], self.members, found)
        if not torch.is_grad_enabled() or not any(w.requires_grad for w in weights):
            return Results([call.scaled(j, w) for j, w in enumerate(weights)], None, None, found.vectors)
        with past_hooks():
            return Results(list(_Scale.apply(call, *weights)), None, None, found.vectors)

    @torch.no_grad()
    def compute_alone(self, weight: Tensor, n_power_iterations: int) -> Tensor:
        """Return the only member's normalised weight, without a graph, after iterations if any.

        With iterations the first rank's vectors become all ranks'. Without, no vector changes.
        """
        local, own = self._locals([weight]), [tuple(self.members[0].vectors(weight))]
        if n_power_iterations:
            self._take(own, self._all.of_first_rank(local, own))
            used, sides = self._all.iterate(local, own, n_power_iterations)
            write(own[0], used[0])
        else:
            sides, _ = self._all.evaluate(local, own)
        sigma = self._means(sides)
        measured = self.members[0].measured
        measured.sigma, measured.index = sigma[0][None], 0
        return self.scale([weight], own, sigma).normalized[0]

    @torch.no_grad()
    def estimate_alone(self, weight: Tensor) -> None:
        """Find the only member's vectors anew: its weight has nothing to do with the one before."""
        local, own = self._locals([weight]), [tuple(self.members[0].vectors(weight))]
        self._take(own, self._all.of_first_rank(local, own))
        write(own[0], self._estimated(0, weight, local[0], own[0]))

    @torch.no_grad()
    def estimated_alone(self, weight: Tensor, hints: Sequence[Tensor | None]) -> Vectors:
        """Return vectors of a weight that is to become the only member's."""
        return self._estimated(0, weight, self._locals([weight])[0], hints)

    def _locals(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [local_of(w).to(dtype) for w, dtype in zip(weights, self._dtypes, strict=True)]

    def _means(self, sides: Sequence[Tensor]) -> list[Tensor]:
        return [sigma.mean() for sigma in sides]

    def _own_vectors(self, weights: Sequence[Tensor]) -> tuple[list[Vectors], Exception | None]:
        """Return the members' vectors, or what is wrong with one of them: other ranks must hear of it first."""
        try:
            for m, w in zip(self.members, weights, strict=True):
                check_memory(local_of(w), f"bssn_fast: the weight of {m.name}")
            return [tuple(m.vectors(w)) for m, w in zip(self.members, weights, strict=True)], None
        except Exception as error:
            return [], error

    def _begin(
        self,
        weights: Sequence[Tensor],
        locals_: list[Tensor],
        own: list[Vectors],
        failure: Exception | None,
        iterate: bool,
    ) -> None:
        """Before the first use: the first rank's vectors become all ranks', and those that cannot be right are found.

        As in `Plan`, vectors that a user seems to have chosen need only be unit vectors, and those that iterations have
        come to since.
        """
        values = []
        for m, w, vectors in zip(self.members, weights, own, strict=False):
            chosen = m.chosen_by_hand(w)
            values.append((*vectors, vectors[0].new_full((1,), float(iterate if chosen is None else chosen))))
        first = self._all.of_first_rank(locals_, values, (1,), failure)
        self._take(own, [v[:-1] for v in first])
        chosen_by_hand = [float(v[-1]) > 0 for v in first]
        good = [all(are_units(v)) for v in own]
        for j, part in enumerate(self._parts_of_sigma(locals_, own)):
            if not good[j] or not (chosen_by_hand[j] or part >= BELONGING):
                write(own[j], self._estimated(j, weights[j], locals_[j], own[j]))
        if not iterate:
            self._seen = _versions(weights, own)

    def _evaluate(
        self, weights: Sequence[Tensor], locals_: list[Tensor], own: list[Vectors], failure: Exception | None
    ) -> list[Tensor]:
        """Return each side's sigma, after a look whether the vectors still belong to the weights."""
        now = _versions(weights, own)
        before = self._seen or [(-2, [])] * len(now)
        noticed = [(a[0] != b[0], a[1] != b[1]) for a, b in zip(now, before, strict=True)] or [(False, False)]
        sides, changes = self._all.evaluate(locals_, own, noticed, failure)
        if any(map(any, changes)):
            self._mend(weights, locals_, own, changes)
            sides, _ = self._all.evaluate(locals_, own)
            now = _versions(weights, own)
        self._seen = now
        return sides

    def _mend(
        self, weights: Sequence[Tensor], locals_: list[Tensor], own: list[Vectors], changes: list[list[bool]]
    ) -> None:
        """In evaluation: find vectors anew that do not belong to their weight, where either has been written to."""
        self._take(own, self._all.of_first_rank(locals_, own))
        parts = self._parts_of_sigma(locals_, own)
        for j, (weight_changed, vectors_changed) in enumerate(changes):
            good = not vectors_changed or all(are_units(own[j]))
            if weight_changed:  # by training, if the vectors have changed too
                good = good and parts[j] >= (BELONGING if vectors_changed else STILL_BELONGING)
            if not good:
                write(own[j], self._estimated(j, weights[j], locals_[j], own[j]))

    def _take(self, own: list[Vectors], first: Sequence[Vectors]) -> None:
        """Make the first rank's vectors this one's too."""
        for vectors, found in zip(own, first, strict=True):
            if not all(map(torch.equal, vectors, found)):
                write(vectors, found)

    def _parts_of_sigma(self, locals_: list[Tensor], own: list[Vectors]) -> list[float]:
        """Return what part of the sigma of one more iteration the vectors give, as `estimation.belong` compares them.

        The least of both sides; 1 for weights that are zero or not finite.
        """
        now, _ = self._all.evaluate(locals_, own)
        _, then = self._all.iterate(locals_, own, 1)
        return [float((a.abs() / b.abs()).nan_to_num(nan=1.0).min()) for a, b in zip(now, then, strict=True)]

    def _estimated(self, j: int, weight: Tensor, local: Tensor, hints: Sequence[Tensor | None]) -> Vectors:
        """Return vectors of a layer's weight, as `estimation.estimate_vectors` does."""
        m, alone = self.members[j], Layers([self._layers[j]], [self._dtypes[j]])
        vectors = [tuple(start_vectors(weight, m.dim, m.two_sided, hints))]

        def iterate(n: int) -> list[float]:
            vectors[:], sides = alone.iterate([local], vectors, n)
            return [float(sides[0].mean())]

        until_it_stands_still(iterate)
        return vectors[0]


def _versions(weights: Sequence[Tensor], own: Sequence[Vectors]) -> list[tuple[int, list[int]]]:
    """Return the versions of each layer's weight and vectors."""
    return [(version(w), list(map(version, vectors))) for w, vectors in zip(weights, own, strict=False)]


def _scale_of(member: Member) -> tuple[float, bool]:
    """Return a constant and whether it is an upper bound, as `reference` takes them."""
    return member.settings.scale, member.settings.kind == AT_MOST


class _Call(NamedTuple):
    """What one call of a plan has found, and how to go on with it."""

    layers: Layers
    parts: list[Part]
    members: list[Member]
    found: Found

    def scaled(self, j: int, weight: Tensor) -> Tensor:
        """Return a normalised weight: this rank scales what it has."""
        local, sigma, m = local_of(weight), self.found.sigma[j], self.members[j]
        scaled = local.to(sigma.dtype) * reference.multiplier(sigma, *_scale_of(m))
        return like(scaled.to(result_dtype(weight, m.autocast)), weight)

    def direction(self, j: int, local: Tensor) -> Tensor:
        """Return this rank's elements of d sigma / d W."""
        dim = self.members[j].dim
        vectors = self.parts[j].local_vectors(self.found.vectors[j], dim)
        return reference.gradient_of_sigma(vectors, local.shape, dim)

    @torch.no_grad()
    def gradients(self, weights: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return dL/dW, sharded as the weights are, where grads, dL/d(normalised weight), are given."""
        dtypes = [sigma.dtype for sigma in self.found.sigma]
        locals_ = [local_of(w).to(dtype) for w, dtype in zip(weights, dtypes, strict=True)]
        given = [
            None if g is None else local_of(_as_sharded(g, w)).to(dtype)
            for g, w, dtype in zip(grads, weights, dtypes, strict=True)
        ]
        found: list[Tensor | None] = []
        for j, inner in enumerate(self.layers.inner(locals_, given)):
            g, w, m = given[j], weights[j], self.members[j]
            if g is None:
                found.append(None)
                continue
            direction = self.direction(j, locals_[j])
            grad = reference.gradient(g, inner, direction, self.found.sigma[j], *_scale_of(m))
            found.append(like(grad.to(w.dtype), w))
        return found

    def differentiable_gradients(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The same in operations on DTensors, for gradients of gradients: with messages for each layer."""
        found: list[Tensor | None] = []
        for j, (w, g) in enumerate(zip(weights, grads, strict=True)):
            if g is None:
                found.append(None)
                continue
            dtype = self.found.sigma[j].dtype
            with torch.no_grad():
                direction = like(self.direction(j, local_of(w)), w)
            x, grad = w.to(dtype), _as_sharded(g, w).to(dtype)
            sigma, inner = _everywhere((direction * x).sum()), _everywhere((grad * x).sum())
            found.append(reference.gradient(grad, inner, direction, sigma, *_scale_of(self.members[j])).to(w.dtype))
        return found


def _as_sharded(tensor: Any, weight: Any) -> Tensor:
    """Return a DTensor sharded as the weight is: gradients may come as parts of a sum, or replicated."""
    found: Tensor = tensor.redistribute(weight.device_mesh, weight.placements)
    return found


def _everywhere(scalar: Any) -> Tensor:
    """Return a sum over the elements of a DTensor, a DTensor itself, with its value on all ranks."""
    from torch.distributed.tensor import Replicate  # there already, as there are DTensors

    found: Tensor = scalar.redistribute(placements=[Replicate()] * scalar.device_mesh.ndim)
    return found


class _Scale(torch.autograd.Function):
    """Autograd's view of weights that are scaled where they lie."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*weights)
        ctx.set_materialize_grads(False)
        results = [call.scaled(j, w) for j, w in enumerate(weights)]
        needed = ctx.needs_input_grad[1:]
        if not all(needed):
            ctx.mark_non_differentiable(*[r for r, wanted in zip(results, needed, strict=True) if not wanted])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[1:], strict=True)]
        call: _Call = ctx.call
        differentiate = call.differentiable_gradients if torch.is_grad_enabled() else call.gradients
        return None, *differentiate(ctx.saved_tensors, wanted)
