"""Copies of a model that torch.nn.DataParallel makes for one call, one on each device.

Each normalises the weights that it has been sent, all at once as its original would. Its vectors go with it; the first
device's are the original's own, and stay.
"""

from __future__ import annotations

from typing import TypeVar, cast

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from bssn_fast.modules.call import Caller
from bssn_fast.modules.parametrization import SpectralNormalization

_GROUPS = "_bssn_fast_groups"
"""Attribute of a copy: the groups of its layers, by the ids of the original's."""

Group = TypeVar("Group", bound=Caller)


def own_group(group: Group, model: nn.Module) -> Group:
    """Return the group of a model's own layers, where the hooks of another group may have been copied with it."""
    if "_is_replica" not in model.__dict__:
        return group
    groups: dict[int, Group] = model.__dict__.setdefault(_GROUPS, {})
    own = groups.get(id(group))
    if own is None:
        own = groups[id(group)] = _made_for(model, group)
    return own


def _made_for(model: nn.Module, group: Group) -> Group:
    wanted = {id(layer[0]) for layer in group.layers()}
    layers = [m for m in model.modules() if isinstance(m, ParametrizationList) and id(_origin(m)) in wanted]
    for layer in layers:  # what torch has sent is a plain attribute where it has a graph
        layer._parameters["original"] = cast(nn.Parameter, layer.original)
    once = {id(layer[0]): layer for layer in layers}  # of those that share a weight
    own = type(group)(once.values())
    own.advice, own.shared = group.advice, own.shared or any(m.held for m in own.members)
    for other in {id(g): g for m in own.members for g in m.groups}.values():
        other.shared = other.shared or own.shared  # an outer model's, which was made before
    return own


def _origin(layer: ParametrizationList) -> SpectralNormalization | None:
    return layer[0].origin if isinstance(layer[0], SpectralNormalization) else None
