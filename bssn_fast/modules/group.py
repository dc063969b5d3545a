"""The layers of one `apply`, normalised together when the model is called."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from threading import get_ident
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.hooks import RemovableHandle

from bssn_fast.calls import composite
from bssn_fast.calls.guard import Guard
from bssn_fast.calls.plan import Plans, parted_by_autocast, partition, signature
from bssn_fast.calls.selective import uncounted
from bssn_fast.calls.serving import Entry
from bssn_fast.calls.sharded import plan_for, refuse_gains
from bssn_fast.distributed.sharded import ShardedWeightError, gathering_modules, is_sharded, refuse_flattened
from bssn_fast.layout import picked, result_dtype
from bssn_fast.modules import recomputation, sharing, writes
from bssn_fast.modules.advice import Advice
from bssn_fast.modules.call import Call, Caller, Chosen, frame_of_call, interrupted
from bssn_fast.modules.lists import original_of
from bssn_fast.modules.parametrization import SpectralNormalization
from bssn_fast.modules.replicas import own_group
from bssn_fast.modules.shards import Shards, found_for
from bssn_fast.tracing.recording import called_eagerly, is_exporting


class Group:
    """Hooks of a model that normalise its layers before a call and end their use after it.

    calls: the running call of each thread, by the thread's number; `begin` and `end` change it.
    published: what the latest call has of its layers, for compiled code.
    recorded: they are those of a call whose beginning was compiled.
    member_ids: of the layers' parametrizations.
    shared: whether another group has some of the layers too.
    """

    _layers: list[weakref.ref[ParametrizationList]]
    _parameters: list[dict[str, Any]]  # of the layers
    _states: list[dict[str, Any]]  # the attributes of the members
    _pending: list[ParametrizationList] | None
    member_ids: frozenset[int]
    shared: bool
    _planned: Plans
    _used: bool  # a call of the model has computed with the layers

    def __init__(self, layers: Iterable[ParametrizationList], parent: Group | None = None) -> None:
        self._handles: list[RemovableHandle] = []
        self._parent = parent  # whose calls of the model end those of this one
        self._has_children = False
        self._shards = Shards()  # of the weights that submodules gather
        self.members: list[SpectralNormalization] = []
        self._set_layers(layers)
        self._start()
        self.advice = Advice()

    def _start(self) -> None:
        self.calls: dict[int, Call] = {}
        self.published: list[Entry | None] | None = None
        self.recorded = False

    def _set_layers(self, layers: Iterable[ParametrizationList]) -> None:
        # Until all is done, so that the next call does again what an interrupt has kept from ending.
        # Some may have been taken off by hand or, of a copy that has not been called, told to normalise themselves.
        ours = (layer for layer in layers if isinstance(layer[0], SpectralNormalization))
        self._pending = [layer for layer in ours if cast(Any, layer[0]).settings.update == "forward"]
        members = [cast(SpectralNormalization, layer[0]) for layer in self._pending]
        kept = set(map(id, members))
        for m in self.members:
            if id(m) not in kept:
                m.slots = tuple([(g, j) for g, j in m.slots if g is not self])
        for j, m in enumerate(members):
            m.slots = (*[(g, i) for g, i in m.slots if g is not self], (self, j))
        self.__dict__.update(
            # Weak: what torch's own remove_parametrizations has taken off is gone.
            _layers=[weakref.ref(layer) for layer in self._pending],
            members=members,
            # Dictionaries of modules: an attribute of a module takes five times as long.
            _parameters=[layer._parameters for layer in self._pending],
            _states=[m.__dict__ for m in members],
            member_ids=frozenset(map(id, members)),
            _used=False,
            _planned=Plans(),  # replaced at once, as other threads may be calling the model
            shared=any(len(m.slots) > 1 for m in members),
            _pending=None,
        )

    def layers(self) -> list[ParametrizationList]:
        """Return torch's lists of parametrizations of the layers that are still there."""
        if self._pending is not None:
            self._set_layers(self._pending)
        found = [ref() for ref in self._layers]
        return [layer for layer in found if layer is not None]

    def __getstate__(self) -> dict[str, Any]:  # a copy makes its plans anew, for its own layers
        kept = ("_handles", "_parent", "_has_children", "_shards", "advice", "shared", "_used")
        return {"_pending": self.layers(), **{name: vars(self)[name] for name in kept}}  # parts may not be copied yet

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()
        self._layers, self._parameters, self._states, self.members = [], [], [], []
        self.member_ids, self._planned = frozenset(), Plans()

    def hook(self, model: nn.Module, *, first: bool = True) -> None:
        """Take part in the model's calls, before or after other pre-hooks that are there."""
        end = model.register_forward_hook(self.end, always_call=True)  # first, as without a beginning it does nothing
        self._handles = [model.register_forward_pre_hook(self.begin, prepend=first), end]

    def discard(self, norms: Iterable[SpectralNormalization]) -> None:
        """Leave out some layers, and those that are gone; remove the hooks when none is left."""
        gone = set(map(id, norms))
        left = [layer for layer in self.layers() if id(layer[0]) not in gone]
        self._set_layers(left)
        if not left and not self._has_children:
            for handle in self._handles:
                handle.remove()

    @called_eagerly
    def begin(self, model: nn.Module, args: object) -> None:
        """Before a call of the model: normalise what no call around this one has normalised already."""
        if is_dynamo_compiling() or is_exporting():
            self._begin_recorded()
        else:
            own_group(self, model)._begin(model, frame_of_call())

    def _begin(self, model: nn.Module, frame: FrameType) -> None:
        if self._pending is not None:
            self._set_layers(self._pending)
        before = self.calls.get(get_ident())
        aside: Sequence[tuple[Caller, Call]] = ()
        if before is not None or self.shared:
            groups = {id(g): g for m in self.members for g in m.groups} if self.shared else {0: self}
            aside = interrupted(groups.values(), frame)
            if aside or (before is not None and not before.running()):
                before = None
            if before is not None and not before.inherited:
                return  # a call inside a call
        with uncounted():
            writes.settle(self.member_ids, forget=True)
            try:
                call = self._called(frame, before, aside)
            except ShardedWeightError:
                self._hand_over(model)
                call = self._called(frame, before, aside)
        self.calls[get_ident()] = call
        if len(self.calls) > 1:  # a thread may have ended in the middle of a call
            for thread, other in list(self.calls.items()):
                if not other.running():
                    self.calls.pop(thread, None)
        self.published, self.recorded = call.entries, False
        for group, _ in aside:
            if group is not self:
                group.calls.pop(get_ident(), None)

    def _called(self, frame: FrameType, before: Call | None, aside: Sequence[tuple[Caller, Call]]) -> Call:
        """Return a call of the model with all its layers normalised."""
        if None in [ref() for ref in self._layers]:
            self.discard([])
        call = Call(frame, len(self._layers), aside)
        chosen = self._choose(call, before)
        if chosen.members:
            self._normalize(call, chosen)
        if self.advice.called(any(m.training for m in self.members), any(chosen.iterating)):
            call.reads = set()
        if self._shards.groups and not sharing.any_block() and not recomputation.in_backward():
            call.measured = self._shards.measure()
        return call

    def _choose(self, call: Call, before: Call | None) -> Chosen:
        """Return the layers that are to be normalised, and put what others have left into the call.

        before: the call of a part of a model that has ended while the whole model's call goes on.
        """
        try:
            weights: list[Tensor] = [parameters["original"] for parameters in self._parameters]
        except KeyError:
            refuse_flattened(None, self.members[0])
            weights = [parameters.get("original", _ELSEWHERE) for parameters in self._parameters]
        members, indices = self.members, list(range(len(weights)))
        planned = self._planned
        readable = planned.alike.holds(weights)
        if not readable and not all([w.numel() and not w.is_meta for w in weights]):
            # Hooks of their layer, or of its list of parametrizations, may bring them in before they are used.
            indices = [j for j, w in enumerate(weights) if w.numel() and not w.is_meta]
            for m, w in zip(members, weights, strict=True):
                refuse_flattened(w, m)
        held: set[int] = set()
        if before is not None or self.shared or sharing.any_block():
            indices, held = self._found_elsewhere(call, before, indices, weights)
        if len(indices) != len(members):
            members, weights = [members[j] for j in indices], [weights[j] for j in indices]
        training = [self._states[j]["training"] for j in indices]
        chosen = Chosen(indices, members, weights, training, planned, readable)
        if held:
            chosen.iterating = [t and j not in held for t, j in zip(chosen.iterating, indices, strict=True)]
        if recomputation.in_backward():
            chosen.iterating = [False] * len(members)
            self._recall(chosen)
        return chosen

    def _found_elsewhere(
        self, call: Call, before: Call | None, indices: list[int], weights: list[Tensor]
    ) -> tuple[list[int], set[int]]:
        """Put what other calls and blocks have of these layers into the call; return those that are left.

        And, of them, those that need no other iteration.
        """
        left, held = [], set()
        for j in indices:
            norm, weight = self.members[j], weights[j]
            ready = before.find(j, weight) if before is not None else None
            if ready is None and len(norm.groups) > 1 and not call.aside and norm.find(weight) is not None:
                continue  # the layer asks all its groups
            block = sharing.block_of(norm) if ready is None else None
            if block is not None:
                entry = block.find(norm, weight)
                if entry is not None:
                    ready, call.others[j] = entry.result, entry.source
                elif block.iterated(norm, weight):
                    held.add(j)
            if ready is not None:
                call.put([j], [weight], [ready])
                call.put_gains([j], [norm.gain])
                continue
            if (before is not None and before.iterated(j, weight)) or (
                not call.aside and norm.iterated_in_call(weight)
            ):
                held.add(j)
            left.append(j)
        return left, held

    def _recall(self, chosen: Chosen) -> None:
        """In a backward pass: find out which vectors the layers had in the forward that is repeated."""
        known = [recomputation.recall(m, in_call=True) if m.training else None for m in chosen.members]
        if any(v is not None for v in known):
            chosen.vectors = [
                v if v is not None else m.vectors(w)
                for v, m, w in zip(known, chosen.members, chosen.weights, strict=True)
            ]
        if any(v is None and m.training for v, m in zip(known, chosen.members, strict=True)):
            self.advice.unknown()

    def _normalize(self, call: Call, chosen: Chosen) -> None:
        plans = self._plans(chosen)
        for plan, part in plans:
            iterate = chosen.iterating[part[0]]
            cached = [sharing.block_of(chosen.members[p]) for p in part] if sharing.any_block() else []
            weights = picked(chosen.weights, part)
            known = found_for(self._parent, [chosen.members[p] for p in part]) if self._parent is not None else None
            if known is not None and chosen.vectors is None:
                results = plan.scale(weights, *known)
            else:
                results = plan.normalize(
                    weights,
                    iterate=iterate,
                    keep=chosen.vectors is None and (not iterate or (bool(cached) and None not in cached)),
                    protect=any(block is not None for block in cached),
                    readable=chosen.readable,
                    vectors=None if chosen.vectors is None else [chosen.vectors[p] or () for p in part],
                )
            indices = picked(chosen.indices, part)
            call.put(indices, weights, results.normalized)
            if plan.learned:
                call.put_gains(indices, [chosen.members[p].gain for p in part])
            call.sources.append((indices, results))
            for j, block in zip(indices, cached, strict=False):
                self._keep(block, call, j)
        for state in self._states:  # what was kept of a layer that was read alone
            if state["_plan"] is not None:
                state["_plan"].forget()
        if not self._used:
            self._used = True
            for m in self.members:
                m.used = True
        if recomputation.maybe_in_checkpoint():
            self._note(call, chosen)

    def _plans(self, chosen: Chosen) -> list[tuple[Any, list[int]]]:
        members, weights, iterating = chosen.members, chosen.weights, chosen.iterating
        flags = iterating if len(set(iterating)) > 1 else None
        key = (members, flags, [state["settings"] for state in self._states])
        planned = chosen.planned
        chosen.readable = chosen.readable or planned.alike.holds(weights)
        if key != planned.key or not chosen.readable:
            whole = signature(weights)
            if key != planned.key or whole != planned.signature:
                planned = self._planned = Plans(key, whole, parted_by_autocast(members, weights))
            planned.alike = Guard(weights)
        casts = tuple([result_dtype(weights[p], True) != weights[p].dtype for p in planned.parted])
        plans = planned.plans.get(casts)
        if plans is None:
            parts = partition(members, weights, iterating)
            plans = [(plan_for([members[p] for p in part], [weights[p] for p in part]), part) for part in parts]
            planned.plans[casts] = plans
        return plans

    def _keep(self, block: sharing.Block | None, call: Call, j: int) -> None:
        """Keep a result for other calls in the block, unless a backward pass will free its graph."""
        entry = call.entries[j]
        if block is None or entry is None or recomputation.in_backward():
            return
        weight, _, result, _ = entry
        block.note_iteration(self.members[j])
        if not composite.is_temporary():
            block.keep(self.members[j], weight, result, call.source(j))

    def _note(self, call: Call, chosen: Chosen) -> None:
        """Let a checkpoint around the call know the vectors that its layers have."""
        for j, norm in zip(chosen.indices, chosen.members, strict=True):
            source = call.source(j)
            if norm.training and source is not None:
                recomputation.note(norm, source.vectors, in_call=True)

    def _hand_over(self, model: nn.Module) -> None:
        """Leave layers whose weights are sharded at the beginning of a call to the submodules that will gather them."""
        left = [layer for layer in self.layers() if is_sharded(original_of(layer))]
        refuse_gains(cast(SpectralNormalization, layer[0]) for layer in left)  # before anything changes
        for module in gathering_modules(model):
            inside = {id(m) for m in module.modules()}
            found = [layer for layer in left if id(layer) in inside]
            if found:
                left = [layer for layer in left if id(layer) not in inside]
                # In this order no layer is ever without a group; what an interrupt leaves half done is done again.
                self._has_children = True
                child = next((group for group in _hooked(module) if group._parent is self), None)
                if child is None:
                    child = Group((), self)
                    child.hook(module, first=False)  # FSDP's own hook gathers the weights
                child._set_layers(found)
                self._shards.groups = list(dict.fromkeys([*self._shards.groups, child]))
                self.discard([cast(SpectralNormalization, layer[0]) for layer in found])

    def _begin_recorded(self) -> None:
        if is_exporting():
            return  # every layer normalises itself
        from bssn_fast.tracing import hooks  # with it comes torch's compiler, which takes long to import

        self.advice.model_called = True
        hooks.begin(self, self.members, [original_of(layer) for layer in self.layers()])

    @called_eagerly
    def end(self, model: nn.Module, args: object, output: object) -> None:
        """After a call of the model, whether or not it succeeded: end the use of its results."""
        if is_dynamo_compiling():
            if not is_exporting():
                from bssn_fast.tracing import hooks

                hooks.end(self, self.members)
        else:
            own_group(self, model)._end(frame_of_call())

    def _end(self, frame: FrameType) -> None:
        thread = get_ident()
        call = self.calls.get(thread)
        if call is not None and call.aside and not call.running():  # an interrupt has ended it, within the call of now
            call.bring_back(thread)
            call = self.calls.get(thread)
        if call is None or (call.frame is not frame and call.running()):
            return  # a call inside a call, or one whose beginning has failed
        parent = self._parent.calls.get(thread) if self._parent is not None else None
        if parent is not None and parent.running() and not recomputation.in_backward():
            call.frame, call.inherited = parent.frame, True  # the results serve until the whole model's call ends
            parent.children.append(self)
            return
        self.calls.pop(thread, None)
        self.published = None
        for child in call.children:
            child.calls.pop(thread, None)
            child.published = None
        if call.aside:
            call.bring_back(thread)


_ELSEWHERE = torch.empty(0, device="meta")
"""In place of a weight that is no parameter, as one that is pruned."""


def groups_of(model: nn.Module) -> Iterator[Group]:
    """Yield the groups whose model is this module or one of its submodules."""
    for module in model.modules():
        yield from _hooked(module)


def _hooked(module: nn.Module) -> Iterator[Group]:
    """Yield the groups whose model is this module."""
    for hook in list(module._forward_pre_hooks.values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Group):
            yield owner
