"""Layers that are normalised together: how they are grouped, and what of the last result can be used again."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from bssn_fast.backends import extension
from bssn_fast.estimation import are_units, belong, estimate_vectors
from bssn_fast.functional import Normalizer, Values, check_weight
from bssn_fast.layout import compute_dtype, is_dense, result_dtype
from bssn_fast.plain import in_transform, normalize_plainly
from bssn_fast.sharded import is_managed, refuse_flattened

_SAMPLES = 32


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread: a forward is then a recomputation."""
    return not is_dynamo_compiling() and torch._C._current_graph_task_id() != -1


def _is_exporting() -> bool:
    # What torch.compiler.is_exporting() returns; asked by name, torch 2.11's compiler takes the answer to be yes.
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    if flag is None:  # all that torch 2.6 tells of torch.export; it is silent in strict mode
        return torch.compiler.is_compiling() and not is_dynamo_compiling()
    return bool(flag)


def is_exporting() -> bool:
    """Whether torch.export, an ONNX exporter or torch.jit.trace records the model: they want plain operations."""
    return _is_exporting() or torch._C._get_tracing_state() is not None  # torch.jit.is_tracing is slow


class LayerState:
    """What a layer remembers between calls; plain Python, so that none of it is a buffer or a module.

    ready, weight, version: the normalised weight for the current model call (or `cached` block), and what it was made
        of; `ready` is None outside.
    sigma, index: sigma of the last normalisation is `sigma[index]`.
    generation: grows whenever the vectors change in a way that tensor versions do not show.
    recomputed: `ready` was made in a backward pass, for a checkpointed forward.
    cached: how many `cached` blocks the layer is in.
    owner: the parameter that the vectors were estimated for, until a plan has looked at it; None in copies.
    estimated: this parameter's version then, and copies of the vectors.
    plan: for normalising the layer by itself.
    """

    __slots__ = (
        "cached",
        "estimated",
        "generation",
        "index",
        "owner",
        "plan",
        "ready",
        "ready_version",
        "recomputed",
        "sigma",
        "version",
        "weight",
    )

    def __init__(self, sigma: Tensor | None = None, generation: int = 0) -> None:
        self.ready: Tensor | None = None
        self.weight: Tensor | None = None
        self.version = self.ready_version = 0
        self.recomputed = False
        self.sigma, self.index = sigma, 0
        self.generation = generation
        self.cached = 0
        self.owner: weakref.ref[Tensor] | None = None
        self.estimated: tuple[int, list[Tensor]] = (0, [])
        self.plan: Plan | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles begin with no result at hand
        return LayerState, (None if self.sigma is None else self.current_sigma()[None], self.generation)

    def note_estimated(self, weight: Tensor, vectors: Iterable[Tensor]) -> None:
        """Remember what the vectors were estimated for."""
        self.owner = weakref.ref(weight)
        self.estimated = version(weight), [v.detach().clone() for v in vectors]

    def chosen_by_hand(self, weight: Tensor, vectors: Iterable[Tensor]) -> bool:
        """Whether vectors look as if a user had chosen them for this weight; the first call asks, and nothing after.

        They have changed since they were estimated, and the weight has not. Who writes into both may have loaded or
        broadcast a model, whose vectors need not be good ones.
        """
        (before, estimated), self.estimated, self.owner = self.estimated, (0, []), None
        changed = any(not torch.equal(v, old.to(v)) for v, old in zip(vectors, estimated, strict=True))
        return changed and version(weight) == before

    def current_sigma(self) -> Tensor:
        """Return sigma of the last normalisation, a scalar."""
        assert self.sigma is not None, "a layer is evaluated before anyone asks"
        return self.sigma[self.index].clone()

    def usable(self, weight: Tensor) -> Tensor | None:
        """Return `ready` if it belongs to this weight as it is now and has a graph if one is wanted now."""
        ready = self.ready  # read once: another thread may withdraw it
        if (
            ready is None
            # A compiler must not look at versions; to it, what is here holds until the end of the call.
            or (ready is weight if is_dynamo_compiling() else not self._made_of(weight, ready))
            or not (ready.requires_grad or not weight.requires_grad or not torch.is_grad_enabled())
            # What was made for autocast is of no use where a model switches autocast off.
            or not (ready.dtype == weight.dtype or ready.dtype == result_dtype(weight, True))
            # A recomputed forward may have a backward pass of its own, which frees the graph.
            or (self.cached and ready.requires_grad and not self.recomputed and in_backward())
        ):
            return None
        return ready

    def _made_of(self, weight: Tensor, ready: Tensor) -> bool:
        """Whether both are what they were when the result was offered."""
        if self.weight is not weight:
            return False
        try:
            return self.version == weight._version and self.ready_version == ready._version
        except RuntimeError:  # one of them keeps no version
            return self.version == version(weight) and self.ready_version == version(ready)

    def holds(self, weight: Tensor) -> bool:
        """Whether `ready` was made of this weight as it is now: it needs no other power iteration."""
        if self.ready is None or self.weight is not weight:
            return False
        return self.ready is weight or self.version == version(weight)

    def offer(self, weight: Tensor, normalized: Tensor, *, recomputed: bool = False) -> None:
        """Make a result available to whoever reads the layer's weight."""
        try:
            self.version, self.ready_version = weight._version, normalized._version
        except RuntimeError:
            self.version, self.ready_version = version(weight), version(normalized)
        self.weight = weight
        self.ready = normalized
        self.recomputed = recomputed

    def note_iteration(self, weight: Tensor) -> None:
        """Remember, for the rest of a `cached` block, an iteration in compiled code, whose result is not kept."""
        self.ready = self.weight = weight
        self.ready_version = -2  # no tensor has it

    def forget(self) -> None:
        """Let no kept result be used any more."""
        if not is_dynamo_compiling():  # compiled code keeps none, and a number that grows would have it compiled again
            self.generation += 1

    def withdraw(self) -> None:
        self.ready = self.weight = None


class Member(Protocol):
    """A layer as the plan sees it; `parametrization.SpectralNormalization` is the one there is."""

    state: LayerState
    settings: Any  # scale, eps, n_power_iterations, backend, gradient_groups
    dim: int
    two_sided: bool
    autocast: bool
    vector_names: tuple[str, ...]
    _buffers: dict[str, Tensor | None]

    def vectors(self, weight: Tensor) -> list[Tensor]: ...


def version(tensor: Tensor) -> int:
    """Return the tensor's version, which grows with every change in place; -1 where torch keeps none."""
    try:
        return tensor._version
    except RuntimeError:  # a tensor made in inference mode
        return -1


def signature(weights: Iterable[Tensor]) -> tuple[object, ...]:
    """Return what a plan for these weights depends on."""
    return tuple([(w.shape, w.stride(), w.dtype, w.device) for w in weights])


def partition(members: Sequence[Member], weights: Sequence[Tensor], flags: Sequence[object]) -> list[list[int]]:
    """Return the indices of the members that can share a call: same device, dtypes, settings and flag.

    The results' dtype is that of the moment: embeddings do not follow autocast.
    """
    groups: dict[object, list[int]] = {}
    for j, (m, w, flag) in enumerate(zip(members, weights, flags, strict=True)):
        s, dtype = m.settings, result_dtype(w, m.autocast)
        key = (w.device, w.dtype, dtype, s.scale, s.eps, s.n_power_iterations, s.backend, flag)
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


class Plan:
    """Normalises members of one device, dtype and settings in one call of the operation."""

    def __init__(self, members: Sequence[Member], weights: Sequence[Tensor]) -> None:
        for member, weight in zip(members, weights, strict=True):
            refuse_flattened(weight, member)
            check_weight(weight, member.dim, "bssn_fast")
        self.members = list(members)
        self.signature = signature(weights)
        self.settings = members[0].settings
        self._normalizer = Normalizer(
            weights,
            [m.dim for m in members],
            [m.two_sided for m in members],
            scale=self.settings.scale,
            eps=self.settings.eps,
            backend=self.settings.backend,
            gradient_groups=self.settings.gradient_groups,
        )
        self.parts = [part for part, _ in self._normalizer.parts] or [slice(None)]
        self._states = [m.state for m in members]
        self._unchecked = True
        self._vectors: list[Tensor] = []
        self._written: list[int] = []  # the vectors' versions in the last evaluation
        self._kept: _Kept | None = None

    def normalize(self, weights: Sequence[Tensor], *, iterate: bool, keep: bool, protect: bool = False) -> list[Tensor]:
        """Return the normalised weights, with a graph if one is wanted.

        iterate: run the members' power iterations first, which changes their vectors.
        keep: hold on to the values, and use those of the last such call again while nothing has changed.
        protect: let torch refuse to write into the results differentiably.
        """
        if in_transform():
            return [normalize_plainly(m, w, iterate=iterate) for m, w in zip(self.members, weights, strict=True)]
        dtype = result_dtype(weights[0], self.members[0].autocast)
        vectors = self._current_vectors(weights)
        if keep and self._kept is not None and self._kept.current(self._states, weights, vectors, dtype):
            return self._normalizer.attach(self._kept.values.aliases(), weights, protect=protect)
        if self._unchecked or (not iterate and self._rewritten(vectors)):
            self._mend(weights)
        n_power_iterations = self.settings.n_power_iterations if iterate else 0
        values = self._normalizer.compute(weights, vectors, n_power_iterations, dtype)
        for j, state in enumerate(self._states):
            state.sigma, state.index = values.sigma, j
            state.generation += iterate
        if keep and any(is_managed(m) for m in self.members):
            keep = False  # FSDP puts other values at other addresses into the same parameters, of the same version
        self._kept = _Kept(self._states, weights, vectors, dtype, values) if keep else None
        return self._normalizer.attach(values, weights, protect=protect)

    def _current_vectors(self, weights: Sequence[Tensor]) -> list[Tensor]:
        found = [m._buffers[name] for m in self.members for name in m.vector_names]
        if len(found) != len(self._vectors) or not all(map(is_, found, self._vectors)):
            self._vectors = [v for m, w in zip(self.members, weights, strict=True) for v in m.vectors(w)]
        return self._vectors

    def _rewritten(self, vectors: Sequence[Tensor]) -> bool:
        """Whether someone else, such as a moving average, may have written into vectors since the last evaluation."""
        versions, before = list(map(version, vectors)), self._written
        self._written = versions
        return versions != before or (self._kept is not None and self._kept.vectors_rewritten(self._states))

    def _mend(self, weights: Sequence[Tensor]) -> None:
        """Estimate vectors anew where they cannot belong to the weight."""
        self._unchecked = False
        if torch.compiler.is_compiling():
            return
        units = iter(are_units(self._current_vectors(weights)))
        for member, weight in zip(self.members, weights, strict=True):
            state, settings = member.state, member.settings
            vectors = member.vectors(weight)
            good = all([next(units) for _ in vectors])
            # Weights that stand in for the layer's own, as in torch.func.functional_call, must not change its vectors.
            if state.owner is not None and state.owner() is weight:
                chosen = state.chosen_by_hand(weight, vectors)
                good = good and (chosen or belong(weight, vectors, member.dim, settings.eps))
            if good:
                continue
            found = estimate_vectors(
                weight, member.dim, member.two_sided, hints=vectors, eps=settings.eps, backend=settings.backend
            )
            for vector, new in zip(vectors, found, strict=True):
                with torch.no_grad(), torch.inference_mode(vector.is_inference()):
                    vector.copy_(new)


class _Kept:
    """Values, and all that they depend on, to tell whether they still hold."""

    def __init__(
        self,
        states: Sequence[LayerState],
        weights: Sequence[Tensor],
        vectors: Sequence[Tensor],
        dtype: torch.dtype,
        values: Values,
    ) -> None:
        self.values = values.aliases()
        # As long as the old weights are held here, new ones cannot come to lie at the same address.
        self.weights = [w.detach() for w in weights]
        self.vectors, self.dtype = list(vectors), dtype
        self.outputs = [version(w) for w in values.normalized]
        dense = all(is_dense(w) for w in weights)  # or their elements would be looked for in the wrong places
        self.versions = _versions(states, weights, vectors) if dense else None
        self.fingerprint: Fingerprint | None = None
        self.fingerprint_of_vectors: Fingerprint | None = None
        if dense and _has_fingerprints(weights[0]):
            self.fingerprint = Fingerprint([*weights, *vectors])
            self.fingerprint_of_vectors = Fingerprint(vectors)
        self.generations = [s.generation for s in states]

    def vectors_rewritten(self, states: Sequence[LayerState]) -> bool:
        """Whether others than power iterations have changed the vectors."""
        if self.fingerprint_of_vectors is None or self.generations != [s.generation for s in states]:
            return False
        return not self.fingerprint_of_vectors.unchanged()

    def current(
        self, states: Sequence[LayerState], weights: Sequence[Tensor], vectors: Sequence[Tensor], dtype: torch.dtype
    ) -> bool:
        return (
            self.versions is not None
            and self.dtype == dtype
            and all(w.data_ptr() == old.data_ptr() for w, old in zip(weights, self.weights, strict=True))
            and all(map(is_, vectors, self.vectors))
            and self.versions == _versions(states, weights, vectors)
            and self.outputs == [version(w) for w in self.values.normalized]  # whoever got them may have changed them
            and (self.fingerprint is None or self.fingerprint.unchanged())
        )


def _versions(states: Sequence[LayerState], weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[int] | None:
    """Return all versions; None where they are not kept or cannot be relied on, as writes through `.data` go unseen."""
    if not _has_fingerprints(weights[0]) and not all(s.cached for s in states):
        return None
    found = [version(x) for x in (*weights, *vectors)]
    return None if -1 in found else found + [s.generation for s in states]


def _has_fingerprints(weight: Tensor) -> bool:
    # On a GPU looking at elements would mean to wait for the device, and evaluating again takes microseconds.
    return weight.device.type == "cpu" and extension.module is not None


def fingerprint_of(result: Tensor) -> Fingerprint | None:
    """Return a fingerprint of one tensor; None where there are none."""
    return Fingerprint([result]) if _has_fingerprints(result) and is_dense(result) else None


class Fingerprint:
    """A hash of some elements of each tensor: writing through `.data` leaves a tensor's version as it was."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        fields: list[int] = []
        for x in tensors:
            count = min(_SAMPLES, x.numel())
            fields += (x.data_ptr(), count, x.numel() // count * x.element_size(), x.element_size())
        self._table, self._tensors = array("q", fields), len(tensors)
        self._value = self._compute()

    def _compute(self) -> int:
        return int(extension.module.cpu_fingerprint(self._table.buffer_info()[0], self._tensors))

    def unchanged(self) -> bool:
        """Whether the hash of what lies at the same addresses now is the same."""
        return self._compute() == self._value


def checked_vectors(vectors: list[Tensor], weight: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return the vectors in the dtype and on the device that the weight needs: the same ones if they fit.

    Raises ValueError if their sizes do not belong to the weight's shape.
    """
    if [tuple(v.shape) for v in vectors] != [(size,) for size in sizes]:
        raise ValueError(
            f"bssn_fast: a weight of shape {tuple(weight.shape)} does not fit its layer's vectors, which were "
            "estimated for another shape. Call bssn_fast.remove before a weight changes shape, and apply again"
        )
    dtype = compute_dtype(weight.dtype)
    if all(v.dtype == dtype and v.device == weight.device and v.is_contiguous() for v in vectors):
        return vectors
    return [v.to(weight.device, dtype).contiguous() for v in vectors]
