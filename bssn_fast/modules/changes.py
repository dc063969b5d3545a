"""Changes of a model that are made as a whole or not at all, whatever interrupts them."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bssn_fast.modules.group import groups_of
from bssn_fast.modules.parametrization import SpectralNormalization

_CONTAINERS = (dict, OrderedDict, list)


@contextlib.contextmanager
def all_or_nothing(model: nn.Module, contents: Iterable[Tensor] = ()) -> Iterator[None]:
    """Put a model's modules, and the values of some tensors, back if the block raises anything.

    What lies in the modules is put back, not what lies in their tensors: vectors are replaced and not written to.
    """
    objects: list[Any] = [*model.modules()]
    groups: list[Any] = [*groups_of(model)]
    groups += [g for m in objects if isinstance(m, SpectralNormalization) for g in m.groups]
    objects += groups
    objects += [m for g in groups for m in g.members]  # they know their groups
    before = [_State(x) for x in {id(x): x for x in objects}.values()]
    values = [(x, x.detach().clone()) for x in contents]
    try:
        yield
    except BaseException:
        for state in before:
            state.restore()
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


class _State:
    """What an object's attributes were, and what was in those that are containers."""

    def __init__(self, x: Any) -> None:
        self.object, self.kind = x, type(x)
        self.attributes = dict(vars(x))
        self.contents = {name: type(v)(v) for name, v in self.attributes.items() if type(v) in _CONTAINERS}
        # A class that parametrize has made for one module has a property for each parametrized tensor.
        self.members = dict(vars(self.kind)) if isinstance(x, nn.Module) and hasattr(x, "parametrizations") else {}

    def restore(self) -> None:
        for name in set(vars(self.kind)) - set(self.members) if self.members else ():
            delattr(self.kind, name)
        for name, value in self.members.items():
            if vars(self.kind).get(name) is not value:
                setattr(self.kind, name, value)
        self.object.__class__ = self.kind
        attributes = self.object.__dict__
        attributes.clear()
        attributes.update(self.attributes)
        for name, saved in self.contents.items():
            container = attributes[name]
            container.clear()
            container.extend(saved) if isinstance(container, list) else container.update(saved)
