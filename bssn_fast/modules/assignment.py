"""Which law each weight gets: what `apply` was told for all layers, or for some by their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from torch import nn

from bssn_fast.calls.arguments import positive, refuse_trained
from bssn_fast.calls.composite import wants_plain_operations
from bssn_fast.distributed.sharded import is_sharded, refuse_gain
from bssn_fast.laws import AT_MOST, CONSTANT, GAIN
from bssn_fast.layout import ONE, Stack
from bssn_fast.modules.blocks import shown_blocks
from bssn_fast.modules.convert import Norm
from bssn_fast.modules.places import Place, named, weight_of
from bssn_fast.modules.settings import VARIANTS

DEFAULT_SCALE = 2**0.5
"""The gain that Kaiming's initialisation has for ReLU. docs/evidence.md: of 0.3 to 4.0, this and 2 trained best."""

Numbers = float | Mapping[str, float | Sequence[float]] | None
"""A number for all layers, or numbers by layers' names; of a layer with blocks, also one for each of them."""

Learned = Literal["learn"] | Iterable[str] | None
"""All layers, or these."""


class WeightLaw(NamedTuple):
    """The law of a weight: its kind (laws.py), and its number or one for each of the weight's blocks."""

    kind: int
    number: float | tuple[float, ...]


class _Given(NamedTuple):
    """An argument of `apply`: the law for all layers, if it has one, and those of single layers."""

    argument: str
    general: WeightLaw | None
    by_name: dict[str, WeightLaw]


def laws_of(
    model: nn.Module,
    stacks: Mapping[Place, Stack],
    variant: str,
    *,
    scale: Numbers,
    at_most: Numbers,
    gain: Learned,
) -> dict[Place, WeightLaw]:
    """Return the law of each place; raise ValueError or TypeError for arguments that contradict each other.

    A law for single layers goes before one for all.
    """
    scaled = VARIANTS[variant][1]
    if scale is not None and not scaled:
        raise ValueError(f"variant {variant!r} has no scale; choose {'ssn' if variant == 'sn' else 'bssn'!r} for one")
    given = [_numbers("scale", scale, CONSTANT), _numbers("at_most", at_most, AT_MOST), _learned(gain)]
    general = [g for g in given if g.general is not None]
    if len(general) > 1:
        names = " and ".join(g.argument for g in general)
        raise ValueError(f"{names} are two laws for the same layers; give one of them, or give layers' names to one")
    if scaled and general and general[0].argument != "scale":
        raise ValueError(
            f"variant {variant!r} multiplies by a scale, and {general[0].argument} would take its place; choose "
            f"{'sn' if variant == 'ssn' else 'bsn'!r}"
        )
    default = general[0].general if general else None
    laws = dict.fromkeys(stacks, default or WeightLaw(CONSTANT, DEFAULT_SCALE if scaled else 1.0))
    givers: dict[Place, str] = {}
    chosen = {(id(p.module), p.tensor_name): p for p in stacks}
    modules = dict(model.named_modules())
    for argument, _, by_name in given:
        for name, law in by_name.items():
            found = named(name, modules)
            place = chosen.get((id(found.module), found.tensor_name))
            if place is None:
                raise ValueError(f"{argument} names {name!r}, which is not one of the layers to normalise")
            if place in givers:
                raise ValueError(f"{name}: {givers[place]} and {argument} both give the layer a law; keep one of them")
            if isinstance(law.number, tuple) and (stacks[place] == ONE or len(law.number) != stacks[place].n):
                has = shown_blocks(stacks[place])
                raise ValueError(f"{argument}[{name!r}] has {len(law.number)} numbers, and the weight {has}")
            laws[place], givers[place] = law, argument
    return laws


def check_laws(laws: Mapping[Place, WeightLaw], stacks: Mapping[Place, Stack], existing: Mapping[Place, Norm]) -> None:
    """Raise ValueError for laws and blocks that the weights cannot have; existing: what normalises them now."""
    known: dict[tuple[int, int], Place] = {}
    for place, law in laws.items():
        weight, dim = weight_of(place, existing[place])
        other = known.setdefault((id(weight), dim), place)
        if laws[other] != law or stacks[other] != stacks[place]:
            what = "another law" if laws[other] != law else "other blocks"
            raise ValueError(
                f"{place.shown()} shares its weight with {other.shown()}, which was given {what}: both must be the "
                "same. Name both in the same way"
            )
        if law.kind == GAIN and is_sharded(weight):
            refuse_gain(place.shown())
        if law.kind == GAIN and wants_plain_operations([weight]):
            raise ValueError(
                f"{place.shown()}: the weight has no values yet, of which its gain is made; materialise the model first"
            )


def _numbers(argument: str, value: object, kind: int) -> _Given:
    if value is None:
        return _Given(argument, None, {})
    if not isinstance(value, Mapping):
        refuse_trained(value, argument)
        return _Given(argument, WeightLaw(kind, positive(value, argument)), {})
    by_name = {}
    for name, number in value.items():
        if not isinstance(name, str):
            raise TypeError(f"{argument} must have names of layers as keys, not {type(name).__name__}")
        shown = f"{argument}[{name!r}]"
        refuse_trained(number, shown)
        if getattr(number, "ndim", 0) == 1:  # a tensor or an array
            number = number.tolist()
        several = isinstance(number, (list, tuple))
        by_name[name] = WeightLaw(
            kind, tuple([positive(n, shown) for n in number]) if several else positive(number, shown)
        )
    return _Given(argument, None, by_name)


def _learned(gain: object) -> _Given:
    law = WeightLaw(GAIN, 0.0)
    if gain is None:
        return _Given("gain", None, {})
    if gain == "learn":
        return _Given("gain", law, {})
    names = None if isinstance(gain, (str, Mapping)) or not isinstance(gain, Iterable) else list(gain)
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"gain must be 'learn', for all layers, or a list of layers' names, not {gain!r}")
    return _Given("gain", None, dict.fromkeys(names, law))
