"""Layers that are normalised together: how they are grouped, and how their vectors are looked after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from bssn_fast.backends.addresses import addresses
from bssn_fast.calls import composite
from bssn_fast.calls.arguments import check_weight
from bssn_fast.calls.contents import contents_of, version
from bssn_fast.calls.estimation import BELONGING, STILL_BELONGING, are_units, belong, estimate_vectors, write
from bssn_fast.calls.guard import Guard
from bssn_fast.calls.kept import Kept
from bssn_fast.calls.member import Measured, Member, gains_of
from bssn_fast.calls.normalizer import Normalizer, Values
from bssn_fast.distributed.sharded import is_sharded, refuse_flattened, refuse_gain, refuse_sharded
from bssn_fast.layout import compute_dtype, fits_kernels, has_its_memory, is_plain, result_dtype


def signature(weights: Iterable[Tensor]) -> tuple[object, ...]:
    """Return what a plan for these weights depends on."""
    return tuple([(w.shape, w.stride(), w.dtype, w.device, w.__class__) for w in weights])


def partition(members: Sequence[Member], weights: Sequence[Tensor], flags: Sequence[object]) -> list[list[int]]:
    """Return the indices of the members that can share a call: same device, dtypes, eps, iterations, way and flag.

    The results' dtype is that of the moment: embeddings do not follow autocast. Sharded weights need less in common.
    """
    groups: dict[object, list[int]] = {}
    for j, (m, w, flag) in enumerate(zip(members, weights, flags, strict=True)):
        s, dtype = m.settings, result_dtype(w, m.autocast)
        way = fits_kernels(w, m.dim)
        key: object = (w.device, w.dtype, dtype, s.eps, s.n_power_iterations, s.backend, way, flag)
        if is_sharded(w):
            key = (w.device, s.n_power_iterations, flag)
        groups.setdefault(key, []).append(j)
    return list(groups.values())


def parted_by_autocast(members: Sequence[Member], weights: Sequence[Tensor]) -> list[int]:
    """Return one member that follows autocast for each device type and dtype of which other members do not.

    Whether autocast casts their results decides how the members are parted.
    """
    kinds: dict[object, dict[bool, int]] = {}
    for j, (m, w) in enumerate(zip(members, weights, strict=True)):
        kinds.setdefault((w.device.type, w.dtype), {}).setdefault(m.autocast, j)
    return [found[True] for found in kinds.values() if len(found) == 2]


class Results(NamedTuple):
    """The normalised weights, with a graph if one was wanted, and what tells which vectors they were made with."""

    normalized: list[Tensor]
    normalizer: Normalizer | None  # None in plain operations
    values: Values | None
    used: list[tuple[Tensor, ...]]  # in plain operations

    def vectors(self, j: int) -> tuple[Tensor, ...]:
        """Return copies of the vectors that the j-th weight was normalised with; nobody else writes into them."""
        if self.values is None or self.normalizer is None:
            return self.used[j]
        return self.normalizer.batch.snapshot_views(self.values.snapshot)[j]


class Seen(NamedTuple):
    """A layer's weight and vectors as an evaluation has left them."""

    weight: Tensor
    address: int
    version: int
    versions: list[int]  # of the vectors
    contents: bytes | None = None  # of the weight, if they are known

    @staticmethod
    def of(weight: Tensor, vectors: Sequence[Tensor]) -> Seen:
        kept = weight if weight.is_leaf else weight.detach()  # its graph need not stay
        return Seen(kept, weight.data_ptr(), version(weight), list(map(version, vectors)))

    def stands_in_for(self, before: Seen | None) -> bool:
        """Whether it is not the layer's own weight; as it may be another one for good, the stack has to tell."""
        return (before is None or before.weight is not self.weight) and composite.in_functional_call()

    def part_to_ask_for(self, before: Seen | None, by_contents: tuple[bool, bool] | None, computed: bool) -> float:
        """Return what part of sigma the vectors must give for them to stay: none of it if the weight is as it was.

        by_contents: whether elements of any weight, and of any vector, have changed since then, if that is known.
        computed: the weight is another tensor each time, which need not have changed.
        """
        if before is None:
            return BELONGING
        if by_contents is not None:
            changed, iterated = by_contents
        else:
            iterated = before.versions != self.versions
            changed = before.weight is not self.weight or before[1:3] != self[1:3]
            # Fused optimizers, as all that writes through `.data`, change weights without a version.
            changed = changed or (iterated and self.weight.device.type == "cpu")
            if not changed and before.contents is not None:  # another plan's values are not at hand
                changed = contents_of([self.weight]) != before.contents
            iterated = iterated or computed
        return (BELONGING if iterated else STILL_BELONGING) if changed else 0.0


class Plan:
    """Normalises members of one device, dtype and settings in one call of the operation."""

    def __init__(self, members: Sequence[Member], weights: Sequence[Tensor]) -> None:
        for member, weight in zip(members, weights, strict=True):
            refuse_flattened(weight, member)
            check_weight(weight, member.dim, f"bssn_fast: {member.name}")
            if is_plain(weight):  # else there is no memory to ask for, or none that kernels read
                check_memory(weight, f"bssn_fast: the weight of {member.name}")
        self.members = list(members)
        self._fitting = Guard(weights)
        self._signature = signature(weights)
        self.settings = members[0].settings
        self._normalizer = self._for_kernels(weights) if fits_kernels(weights[0], members[0].dim) else None
        firsts = accumulate((m.settings.stack.n for m in members), initial=0)
        self._measured = [(m.measured, Measured.at(j, m.settings.stack)) for m, j in zip(members, firsts, strict=False)]
        self.learned = any(m.gain is not None for m in members)
        self._unchecked = True
        self._buffers = [m._buffers for m in members for _ in m.vector_names]
        self._names = [name for m in members for name in m.vector_names]
        self._alike = Guard()  # vectors like those that were found to be right
        self._addresses = b""  # where the weights and the vectors were found to have all their memory
        self._kept: Kept | None = None

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Whether the plan is for such weights, as far as shapes, strides, dtypes and devices decide."""
        if self._fitting.holds(weights):
            return True
        if self._signature != signature(weights):
            return False
        self._fitting = Guard(weights)
        return True

    def forget(self) -> None:
        """Let go of what was kept of the last evaluation."""
        self._kept = None

    def _for_kernels(self, weights: Sequence[Tensor]) -> Normalizer:
        return Normalizer(
            weights,
            [m.dim for m in self.members],
            [m.two_sided for m in self.members],
            laws=[law for m in self.members for law in m.settings.laws()],
            stacks=[m.settings.stack for m in self.members],
            eps=self.settings.eps,
            backend=self.settings.backend,
            gradient_groups=self.settings.gradient_groups,
        )

    def normalize(
        self,
        weights: Sequence[Tensor],
        *,
        iterate: bool,
        keep: bool,
        protect: bool = False,
        readable: bool = False,
        vectors: Sequence[Sequence[Tensor]] | None = None,
    ) -> Results:
        """Return the normalised weights, with a graph if one is wanted.

        readable: kernels can read the weights, as a guard says; otherwise it is found out.
        iterate: run the members' power iterations first, which changes their vectors.
        keep: hold on to the values, and use those of the last such call again while nothing has changed.
        protect: let torch refuse to write into the results differentiably.
        vectors: of each member, to evaluate with in place of its own.
        """
        gains = gains_of(self.members) if self.learned else []
        for m in self.members if gains else ():
            if m.gain is not None and is_sharded(m.gain):
                refuse_gain(f"bssn_fast: {m.name}")
        readable = readable and all(map(is_plain, gains)) and not composite.has_tangents(gains)
        if not readable and composite.wants_plain_operations([*weights, *gains] if gains else weights):
            return self._in_plain_operations(weights, iterate, vectors)
        for m in self.members if gains else ():
            if m.gain is not None:
                check_memory(m.gain, f"bssn_fast: the gain of {m.name}")
        dtype = result_dtype(weights[0], self.members[0].autocast)
        own, normalizer = self._current_vectors(weights), self._normalizer
        if normalizer is None:
            if vectors is None and (self._unchecked or not iterate):
                self._mend(weights, own, None, iterate)
            return self._in_plain_operations(weights, iterate, vectors)
        if vectors is not None:
            flat = [v for group in vectors for v in group]
            values = normalizer.compute(weights, flat, 0, dtype, gains, readable=readable)
            return _attached(normalizer, values, weights, gains, protect, readable)
        kept, self._kept = self._kept, None  # in an error's case it is gone
        if keep and not iterate and kept is not None and kept.current(weights, own, gains, dtype):
            self._kept = kept
            self._publish(kept.values)  # other calls, of a layer alone or under autocast, may have come between
            return _attached(normalizer, kept.values.aliases(), weights, gains, protect, readable)
        if self._unchecked or not iterate:
            self._mend(weights, own, kept, iterate)
        n = self.settings.n_power_iterations if iterate else 0
        values = normalizer.compute(weights, own, n, dtype, gains, readable=readable)
        self._publish(values)
        if keep:
            self._kept = Kept.of(weights, own, gains, dtype, values)
            if self._kept is not None:
                self._know_again(weights, self._kept)
        return _attached(normalizer, values, weights, gains, protect, readable)

    def _know_again(self, weights: Sequence[Tensor], kept: Kept) -> None:
        """Let members know the contents of their weights, for other plans, as of a layer that is read alone."""
        for member, weight, contents in zip(self.members, weights, kept.of_weights(), strict=True):
            if member.seen is not None and member.seen.weight is weight:
                member.seen = member.seen._replace(contents=contents)

    def _publish(self, values: Values) -> None:
        """Let members know the sigma that their weights are divided by."""
        for measured, index in self._measured:
            measured.sigma, measured.index = values.sigma, index

    def scale(self, weights: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]], sigma: Sequence[Tensor]) -> Results:
        """Return the normalised weights, with a graph if one is wanted, of vectors and sigma [] that are known."""
        if self._normalizer is None or composite.wants_plain_operations(weights):
            return self._in_plain_operations(weights, False, vectors)
        dtype = result_dtype(weights[0], self.members[0].autocast)
        values = self._normalizer.scaled(weights, vectors, sigma, dtype)
        return _attached(self._normalizer, values, weights, (), protect=False, readable=False)

    def _in_plain_operations(
        self, weights: Sequence[Tensor], iterate: bool, vectors: Sequence[Sequence[Tensor]] | None
    ) -> Results:
        for m, w in zip(self.members, weights, strict=True):
            refuse_sharded(w, f"bssn_fast: {m.name}")
        n = self.settings.n_power_iterations if iterate else 0
        given: list[Any] = [None] * len(weights) if vectors is None else list(vectors)
        found = [composite.normalize(m, w, n, v) for m, w, v in zip(self.members, weights, given, strict=True)]
        return Results([w for w, _ in found], None, None, [v for _, v in found])

    def _current_vectors(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the members' vectors, after a look at what the kernels will read and write.

        The memory behind a tensor can change while the object stays the same: by `tensor.data = ...`, `resize_`, `set_`
        and by what happens to its storage.
        """
        found: list[Any] = list(map(getitem, self._buffers, self._names))
        if self._alike.holds(found) and self._addresses == addresses(weights, found):
            return found
        found = [v for m, w in zip(self.members, weights, strict=True) for v in m.vectors(w)]
        for m, w in zip(self.members, weights, strict=True):
            check_memory(w, f"bssn_fast: the weight of {m.name}")
        self._alike = Guard(found)
        self._addresses = addresses(weights, found)
        return found

    def _mend(self, weights: Sequence[Tensor], vectors: list[Tensor], kept: Kept | None, iterate: bool) -> None:
        """Estimate vectors where they cannot belong to the weight.

        Looked for before the first use, and in evaluation where someone has written into vectors, as moving averages
        do, or into weights, with or without iterations in between.
        """
        first, self._unchecked = self._unchecked, False
        if torch.compiler.is_compiling():
            return
        rest = iter(vectors)
        groups = [[next(rest) for _ in m.vector_names] for m in self.members]
        now = [Seen.of(w, own) for w, own in zip(weights, groups, strict=True)]
        by_contents = None if kept is None else kept.changes(weights, vectors)
        written = any(m.seen is None or m.seen.versions != n.versions for m, n in zip(self.members, now, strict=True))
        look = first or (written if by_contents is None else by_contents[1])
        units = iter(are_units(vectors) if vectors and look else [True] * len(vectors))
        for member, weight, own, new in zip(self.members, weights, groups, now, strict=True):
            good = all([next(units) for _ in own])
            # None for weights that stand in for the layer's own, as in torch.func.functional_call: they must not
            # change its vectors.
            chosen = member.chosen_by_hand(weight) if first else None
            at_least, evaluated = BELONGING if chosen is False else 0.0, False
            # In training, what follows an iteration, as in a `cached` block, uses the vectors that this has left.
            if not iterate and (first or not member.training) and not new.stands_in_for(member.seen):
                evaluated = True
                if chosen is None:
                    at_least = new.part_to_ask_for(member.seen, by_contents, member.preceded)
            if good and at_least:
                stack = member.settings.stack
                good = belong(weight, own, member.dim, self.settings.eps, at_least=at_least, stack=stack)
            if not good:
                write(own, self._estimated(member, weight, own))
                new = Seen.of(weight, own)
            if evaluated:
                member.seen = new

    def _estimated(self, member: Member, weight: Tensor, hints: list[Tensor]) -> list[Tensor]:
        s, sides = member.settings, (member.dim, member.two_sided)
        return estimate_vectors(weight, *sides, hints=hints, eps=s.eps, backend=s.backend, stack=s.stack)


class Plans:
    """Plans for all layers of a call, each with the layers' positions, and what they depend on.

    parted: the layers that tell, by whether autocast casts their results, which of the plans to take. There are plans
        for each case, as a model may be called with and without autocast in turn.
    """

    def __init__(self, key: object = None, signature: object = None, parted: Sequence[int] = ()) -> None:
        self.key, self.signature, self.parted = key, signature, parted
        self.alike = Guard()  # weights like the latest ones
        self.plans: dict[tuple[bool, ...], list[tuple[Any, list[int]]]] = {}  # a Plan, or a `sharded.ShardedPlan`


def _attached(
    normalizer: Normalizer,
    values: Values,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    protect: bool,
    readable: bool,
) -> Results:
    attached = normalizer.attach(values, weights, gains, protect=protect, readable=readable)
    return Results(attached, normalizer, values, [])


def check_memory(tensor: Tensor, what: str) -> None:
    """Raise RuntimeError for a tensor that reaches beyond its memory, or whose memory has been freed."""
    if tensor.device.type != "meta" and not has_its_memory(tensor):
        raise RuntimeError(f"{what}: its memory has been freed or made smaller. Bring it back before the layer is used")


def checked_vectors(member: Member, vectors: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Return the vectors in the dtype, on the device and in the layout that the weight needs: the same if they fit.

    Raises ValueError if their sizes do not belong to the weight's shape, RuntimeError if their memory is gone.
    """
    stack, name = member.settings.stack, member.name
    shapes = stack.vector_shapes(weight.shape, member.dim, member.two_sided)
    if not stack.fits(weight.shape) or [tuple(v.shape) for v in vectors] != shapes:
        raise ValueError(
            f"bssn_fast: {name}: a weight of shape {tuple(weight.shape)} does not fit its layer's vectors, which are "
            "those of another shape. Call bssn_fast.remove before a weight changes shape, and apply again"
        )
    if not (is_dynamo_compiling() or composite.in_transform()):  # torch 2.6's compiler knows none of these questions
        for vector in vectors:
            check_memory(vector, f"bssn_fast: a vector of {name}")
    dtype = compute_dtype(weight.dtype)
    plain = is_dynamo_compiling() or not any(v.is_neg() for v in vectors)  # a compiler does not know the question
    if plain and all(v.dtype == dtype and v.device == weight.device and v.is_contiguous() for v in vectors):
        return vectors
    return [_moved(v, weight.device, dtype) for v in vectors]


def _moved(vector: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not is_dynamo_compiling() and torch.is_inference_mode_enabled():  # a buffer is written to outside of it too
        with torch.inference_mode(False):
            return _moved(vector, device, dtype)
    if vector.device.type == "meta" and device.type != "meta":
        return torch.zeros(vector.shape, device=device, dtype=dtype)  # no unit vector: estimated at the first use
    return vector.to(device, dtype).resolve_neg().contiguous()
