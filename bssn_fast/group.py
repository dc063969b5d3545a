"""The layers of one `apply`, normalised together when the model is called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.hooks import RemovableHandle

from bssn_fast.parametrization import SpectralNormalization, Usage, in_backward
from bssn_fast.plan import Plan, partition, signature


class Group:
    """Hooks of a model that normalise its layers before a call and withdraw the results after it."""

    def __init__(self, layers: Sequence[ParametrizationList], usage: Usage) -> None:
        self._usage = usage
        self._handles: list[RemovableHandle] = []
        self._depth = 0
        self._offering = False
        self._set_layers(layers)

    def _set_layers(self, layers: Sequence[ParametrizationList]) -> None:
        self._layers = list(layers)
        self._members: list[SpectralNormalization] = [layer[0] for layer in layers]  # type: ignore[misc]
        self._signature: object = None
        self._plans: list[tuple[Plan, list[int]]] = []

    def __getstate__(self) -> dict[str, Any]:  # a copy makes its plans anew, for its own layers
        return {**self.__dict__, "_signature": None, "_plans": [], "_depth": 0, "_offering": False}

    def hook(self, model: nn.Module) -> None:
        """Take part in the model's calls."""
        self._handles = [
            model.register_forward_pre_hook(self.begin, prepend=True),
            model.register_forward_hook(self.end, always_call=True),
        ]

    def discard(self, layers: Iterable[ParametrizationList]) -> None:
        """Leave out some layers, and the hooks when none is left."""
        gone = {id(layer) for layer in layers}
        self._set_layers([layer for layer in self._layers if id(layer) not in gone])
        if not self._layers:
            for handle in self._handles:
                handle.remove()

    def begin(self, model: nn.Module, args: object) -> None:
        """Before a call of the model: normalise what no call around this one has normalised already."""
        self._depth += 1
        if self._depth > 1:
            return
        self._usage.model_called = True
        weights = [layer._parameters["original"] for layer in self._layers]
        if all(m.state.usable(w) for m, w in zip(self._members, weights, strict=True)):  # type: ignore[arg-type]
            return
        self._offering = True
        self._normalize(weights)  # type: ignore[arg-type]

    def _normalize(self, weights: list[Tensor]) -> None:
        training = [m.training for m in self._members]
        flags = training if len(set(training)) > 1 else [True] * len(training)
        key = (signature(weights), flags, [m.settings for m in self._members])
        if key != self._signature:
            parts = partition(self._members, weights, flags)
            self._plans = [(Plan([self._members[j] for j in part], [weights[j] for j in part]), part) for part in parts]
            self._signature = key
        recomputation = in_backward()
        if any(training):
            if recomputation:
                self._usage.recompute(whole_model=True)
            else:
                self._usage.count()
        for plan, part in self._plans:
            iterate = training[part[0]] and not recomputation
            keep = not iterate or all(self._members[j].state.cached for j in part)
            chosen = [weights[j] for j in part]
            for j, normalized in zip(part, plan.normalize(chosen, iterate=iterate, keep=keep), strict=True):
                self._members[j].state.offer(weights[j], normalized)

    def end(self, model: nn.Module, args: object, output: object) -> None:
        """After a call of the model, whether or not it succeeded: withdraw the results, but those that are cached."""
        self._depth -= 1
        if self._depth == 0 and self._offering:
            self._offering = False
            for member in self._members:
                if not member.state.cached:
                    member.state.withdraw()


def groups_of(model: nn.Module) -> Iterator[Group]:
    """Yield the groups whose model is this module or one of its submodules."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Group):
                yield owner
