"""Which matrices each weight holds: what `apply` was told by `blocks`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bssn_fast.calls.arguments import whole_number
from bssn_fast.distributed.sharded import is_sharded, refuse_stack
from bssn_fast.layout import ONE, Stack
from bssn_fast.modules.convert import WEIGHT, Norm, TorchSpectralNorm, is_preceded, own
from bssn_fast.modules.places import Place, named, norms_by_weight, weight_of


def checked_blocks(blocks: object) -> dict[str, int]:
    """Return how many blocks are asked for by name; raise ValueError or TypeError for what is no such mapping."""
    if blocks is None:
        return {}
    if not isinstance(blocks, Mapping) or not all(isinstance(name, str) for name in blocks):
        raise TypeError(f"blocks must be numbers by names, as {{'attention.in_proj_weight': 3}}, not {blocks!r}")
    for name, given in blocks.items():
        if whole_number(given) < 1:
            raise ValueError(f"blocks[{name!r}] must be a whole number of at least 1, not {given!r}")
    return {name: whole_number(given) for name, given in blocks.items()}


def stacks_of(model: nn.Module, existing: Mapping[Place, Norm], blocks: Mapping[str, int]) -> dict[Place, Stack]:
    """Return which matrices each place's weight holds; raise ValueError or TypeError where it cannot be divided so.

    existing: the places, and what normalises them now. A weight that has blocks keeps them.
    """
    shared = norms_by_weight(model)
    now: dict[Place, Norm] = {p: norm or shared.get(_key(p, norm)) for p, norm in existing.items()}
    ours = {p: own(norm) for p, norm in now.items()}
    stacks = {p: ONE if norm is None else norm.settings.stack for p, norm in ours.items()}
    chosen = {(id(p.module), p.tensor_name): p for p in existing}
    modules, givers = dict(model.named_modules()), dict[Place, str]()
    for name, n in blocks.items():
        found = named(name, modules)
        place = chosen.get((id(found.module), found.tensor_name))
        if place is None:
            raise ValueError(f"blocks names {name!r}, which is not one of the layers to normalise; add it to those")
        if givers.setdefault(place, name) != name:
            raise ValueError(f"blocks names {place.shown()} twice, as {givers[place]!r} and {name!r}; keep one of them")
        stack = _stack(place, *weight_of(place, existing[place]), n)
        if stack != stacks[place] and (ours[place] is not None or isinstance(now[place], TorchSpectralNorm)):
            remedy = "call bssn_fast.remove, and apply again"
            if ours[place] is None or is_preceded(now[place]):
                remedy = "take its spectral norm off first"
            raise ValueError(
                f"{place.shown()}: the weight is normalised as {shown_blocks(stacks[place])} already; {remedy}"
            )
        stacks[place] = stack
    return stacks


def shown_blocks(stack: Stack) -> str:
    """Return how many blocks there are, for messages."""
    return "one block" if stack == ONE else f"{stack.n} blocks"


def _key(place: Place, norm: Norm) -> tuple[int, int]:
    weight, dim = weight_of(place, norm)
    return id(weight), dim


def _stack(place: Place, weight: Tensor, dim: int, n: int) -> Stack:
    """Return what a weight with n blocks holds."""
    shape = tuple(weight.shape)
    if dim != 0:
        raise ValueError(
            f"{place.shown()}: blocks are parts of the first dimension, and its output is dimension {dim}; leave it out"
        )
    convolution = isinstance(place.module, _ConvNd) and place.tensor_name == WEIGHT
    numbered = weight.ndim > 2 and not convolution
    if shape[0] % n or (numbered and n not in (1, shape[0])):
        fitting = f"as many as its first dimension, {shape[0]}" if numbered else "a divisor of its first dimension"
        raise ValueError(
            f"{place.shown()}: a weight of shape {shape} cannot be divided into {n} blocks; give {fitting}"
        )
    stack = Stack(n, numbered and n == shape[0])
    if is_sharded(weight) and stack != ONE:
        refuse_stack(place.shown())
    return stack
