"""The layers of one `apply`, normalised together when the model is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress
from types import FrameType
from typing import Any, cast

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.hooks import RemovableHandle

from bssn_fast.handed import settle
from bssn_fast.layout import result_dtype
from bssn_fast.parametrization import SpectralNormalization, Usage, original_of
from bssn_fast.plain import in_transform
from bssn_fast.plan import Plan, in_backward, is_exporting, parted_by_autocast, partition, signature
from bssn_fast.sharded import ShardedWeightError, gathering_modules, is_sharded, refuse_flattened, refuse_sharded


class _Planned:
    """Plans for all layers of a call, each with the layers' indices, and what they depend on.

    parted: the layers that tell, by whether autocast casts their results, which of the plans to take. There are plans
        for each case, as a model may be called with and without autocast in turn.
    """

    def __init__(self, key: object = None, parted: Sequence[int] = ()) -> None:
        self.key, self.parted = key, parted
        self.plans: dict[tuple[bool, ...], list[tuple[Plan, list[int]]]] = {}


class Group:
    """Hooks of a model that normalise its layers before a call and withdraw the results after it."""

    def __init__(self, layers: Sequence[ParametrizationList], usage: Usage) -> None:
        self._usage = usage
        self._handles: list[RemovableHandle] = []
        self._depth = 0
        self._offered: list[SpectralNormalization] = []  # to the call that is running
        self._recomputing = False
        self._parent: Group | None = None  # whose calls of the model end those of this one
        self._children = 0
        self._set_layers(layers)

    def _set_layers(self, layers: Sequence[ParametrizationList]) -> None:
        self._layers = list(layers)
        self._members: list[SpectralNormalization] = [cast(SpectralNormalization, layer[0]) for layer in layers]
        self._planned = _Planned()  # replaced at once, as other threads may be calling the model

    def __getstate__(self) -> dict[str, Any]:  # a copy makes its plans anew, for its own layers
        return {
            **self.__dict__,
            "_planned": _Planned(),
            "_depth": 0,
            "_offered": [],
            "_recomputing": False,
        }

    def hook(self, model: nn.Module, *, first: bool = True) -> None:
        """Take part in the model's calls, before or after other pre-hooks that are there."""
        self._handles = [
            model.register_forward_pre_hook(self.begin, prepend=first),
            model.register_forward_hook(self.end, always_call=True),
        ]

    def discard(self, layers: Iterable[ParametrizationList]) -> None:
        """Leave out some layers, and those taken out before; remove the hooks when none is left."""
        gone = {id(layer) for layer in layers}
        gone |= {
            id(layer) for layer, m in zip(self._layers, self._members, strict=True) if m.settings.update != "forward"
        }
        self._set_layers([layer for layer in self._layers if id(layer) not in gone])
        if not self._layers and not self._children:
            for handle in self._handles:
                handle.remove()

    def begin(self, model: nn.Module, args: object) -> None:
        """Before a call of the model: normalise what no call around this one has normalised already."""
        if is_dynamo_compiling() or is_exporting():
            self._begin_compiled()
            return
        self._depth += 1
        if self._depth > 1:
            if _is_nested(model):
                return
            self._depth = 1
            self._withdraw()
        settle(forget=True)
        self._usage.model_called = True
        try:
            weights = cast("list[Tensor]", [layer._parameters["original"] for layer in self._layers])
        except KeyError:
            refuse_flattened(None, self._members[0])
            raise
        members, iterating = self._members, [m.training for m in self._members]
        for m in members:
            if m.state.ready is not None or m.settings.update != "forward":
                members, weights, iterating = self._left_to_do(weights)
                break
        if members:
            self._offered = members
            try:
                self._normalize(members, weights, iterating)
            except ShardedWeightError:
                self._hand_over(model)
                return self.begin(model, args)

    def _left_to_do(self, weights: list[Tensor]) -> tuple[list[SpectralNormalization], list[Tensor], list[bool]]:
        """Leave out layers that are normalised already, or taken out of the group by a later `apply` or `remove`.

        Returns the layers, their weights, and which of them need power iterations.
        """
        wanted = [
            m.settings.update == "forward" and m.state.usable(w) is None
            for m, w in zip(self._members, weights, strict=True)
        ]
        members, weights = list(compress(self._members, wanted)), list(compress(weights, wanted))
        return members, weights, [m.training and not m.state.holds(w) for m, w in zip(members, weights, strict=True)]

    def _normalize(self, members: list[SpectralNormalization], weights: list[Tensor], iterating: list[bool]) -> None:
        self._recomputing = in_backward()
        if self._recomputing:
            iterating = [False] * len(members)
        flags = iterating if len(set(iterating)) > 1 else None
        key = (members, signature(weights), flags, [m.settings for m in members])
        planned = self._planned
        if key != planned.key:
            planned = self._planned = _Planned(key, parted_by_autocast(members, weights))
        casts = tuple([result_dtype(weights[j], True) != weights[j].dtype for j in planned.parted])
        plans = planned.plans.get(casts)
        if plans is None:
            parts = partition(members, weights, iterating)
            plans = [(Plan([members[j] for j in part], [weights[j] for j in part]), part) for part in parts]
            planned.plans[casts] = plans
        if self._recomputing and any(m.training for m in members):
            self._usage.recompute(inside=True)
        results: list[list[Tensor]] = []
        for plan, part in plans:
            iterate = iterating[part[0]]
            cached = [members[j].state.cached > 0 for j in part]
            chosen, keep = [weights[j] for j in part], not iterate or all(cached)
            found = plan.normalize(chosen, iterate=iterate, keep=keep, protect=any(cached))
            for j, normalized in zip(part, found, strict=True):
                members[j].state.offer(weights[j], normalized, recomputed=self._recomputing)
            results += [found[s] for s in plan.parts]
        if any(iterating):
            self._usage.count(results)

    def _hand_over(self, model: nn.Module) -> None:
        """Leave layers whose weights are sharded at the beginning of a call to the submodules that will gather them."""
        self._depth = 0
        self._withdraw()
        left = [layer for layer in self._layers if is_sharded(original_of(layer))]
        for module in gathering_modules(model):
            inside = {id(m) for m in module.modules()}
            found = [layer for layer in left if id(layer) in inside]
            if found:
                left = [layer for layer in left if id(layer) not in inside]
                child = Group(found, Usage(len(found)))
                child._parent = self
                for member in child._members:
                    member.usage = child._usage
                child.hook(module, first=False)  # FSDP's own hook gathers the weights
                self._children += 1
                self.discard(found)
        for layer in left:
            names = {id(m): name for name, m in model.named_modules()}
            name = names[id(layer)].rpartition("parametrizations.")[0].rstrip(".")
            refuse_sharded(original_of(layer), name or type(model).__name__)

    def _begin_compiled(self) -> None:
        if is_exporting():
            return  # every layer normalises itself
        from bssn_fast import compiled  # with it comes torch's compiler, which takes long to import

        self._depth, self._offered = 1, self._members  # for `begin`, should this call be interrupted
        compiled.begin(self._layers, self._usage)

    def end(self, model: nn.Module, args: object, output: object) -> None:
        """After a call of the model, whether or not it succeeded: withdraw the results, but those that are cached."""
        if is_dynamo_compiling():
            if not is_exporting():
                from bssn_fast import compiled

                self._depth, self._offered = 0, []
                compiled.end(self._layers)
            return
        self._depth = max(0, self._depth - 1)  # a hook before `begin` may have failed
        if self._depth > 0:
            return
        if self._parent is not None and self._parent._depth > 0 and not self._recomputing:
            self._parent._offered = self._parent._offered + self._offered
            self._offered = []
        self._withdraw()

    def _withdraw(self) -> None:
        for member in self._offered:
            # The backward pass of a recomputed forward frees its graph: no other may use it, also in a `cached` block.
            if self._recomputing or not member.state.cached:
                member.state.withdraw()
            elif in_transform() and member.state.weight is not None:
                member.state.note_iteration(member.state.weight)  # the result belongs to the transform
        self._offered, self._recomputing = [], False


_CALL = nn.Module._call_impl.__code__


def _is_nested(model: nn.Module) -> bool:
    """Whether one call of the model is running inside another.

    `end` does not hear of a call that KeyboardInterrupt, which is no Exception, has ended.
    """
    running = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        running += frame.f_code is _CALL and frame.f_locals.get("self") is model
        frame = frame.f_back
    return running != 1


def _call_eagerly(*functions: Callable[..., None]) -> None:
    """Have torch.compile leave functions alone where nothing that it compiles calls them: hooks of a compiled module.

    It would make a graph of each, in which layers that are not used get gradients of zeros. That is what happens with
    versions of torch that do not have what is asked for here.
    """
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:
        return
    for function in functions:
        set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


_call_eagerly(Group.begin, Group.end)


def groups_of(model: nn.Module) -> Iterator[Group]:
    """Yield the groups whose model is this module or one of its submodules."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Group):
                yield owner
