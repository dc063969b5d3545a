"""Where normalised weights sit: which ones are chosen, and how a module is changed and changed back."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from bssn_fast.calls.arguments import check_weight
from bssn_fast.distributed.sharded import is_sharded, refuse_managed, refuse_unfit
from bssn_fast.laws import GAIN
from bssn_fast.modules import convert, recurrent
from bssn_fast.modules.access import quick_access
from bssn_fast.modules.convert import WEIGHT, Norm, Preceded, TorchSpectralNorm
from bssn_fast.modules.lists import original_of, parametrizations_of, weight_before
from bssn_fast.modules.loading import stop_watching, watch_loading
from bssn_fast.modules.parametrization import SpectralNormalization
from bssn_fast.modules.pickling import allow_pickling
from bssn_fast.modules.settings import Settings

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_COMPUTING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
LAYER_TYPES = (*_COMPUTING, nn.Embedding)
"""The layers whose `weight` is normalised without being named."""


class Place(NamedTuple):
    """A weight of a module. The name is the module's, or the parameter's where that is not called `weight`.

    dim: the output dimension that was asked for; None for the layer's own.
    """

    name: str
    module: nn.Module
    tensor_name: str = WEIGHT
    dim: int | None = None

    def shown(self) -> str:
        """Return the name, for messages: a model that is a layer itself is called by its type."""
        return self.name or type(self.module).__name__

    def parametrizations(self) -> ParametrizationList:
        """Return what torch's parametrize keeps for the weight."""
        return parametrizations_of(self.module, self.tensor_name)

    def weight_before(self, norm: SpectralNormalization) -> Tensor:
        """Return the weight that a normalisation gets."""
        layer = self.parametrizations()
        return weight_before(layer, list(layer).index(norm)) if norm.preceded else layer.original


def choose(
    model: nn.Module,
    names: Iterable[str] | None,
    filter_fn: Callable[[str, nn.Module], bool] | None,
    only: str | None = None,
    more: Iterable[str] = (),
) -> list[Place]:
    """Return the weights to normalise, each once; raise ValueError or TypeError if there are none, or no such names.

    more: names of weights that are taken too, where the layers are not chosen by names.
    """
    modules = dict(model.named_modules())
    if only not in (None, "normalized"):
        raise ValueError(f"only must be 'normalized' or None, not {only!r}")
    if only is not None:
        if names is not None:
            raise ValueError("names and only='normalized' both choose layers; keep one of them")
        places = [Place(_shown(n, t), m, t) for n, m in modules.items() for t in convert.carried(m)]
    elif names is None:
        places = [Place(n, m) for n, m in modules.items() if isinstance(m, LAYER_TYPES)]
        if filter_fn is None:  # parameters that were named to an earlier call
            ours = {(n, t) for n, m in modules.items() for t, of_torch in convert.carried(m).items() if not of_torch}
            layers = {(p.name, p.tensor_name) for p in places}
            places += [Place(_shown(n, t), modules[n], t) for n, t in sorted(ours - layers)]
    elif isinstance(names, str):
        raise TypeError(f"names must be a list of layer names; write names=[{names!r}]")
    else:
        names = list(names)
        for name in names:
            if not isinstance(name, str):
                raise TypeError(
                    f"names must be names of layers, not {type(name).__name__}: those of `model.named_modules()`; or "
                    "choose layers by `filter_fn`"
                )
        places = [named(name, modules) for name in names]
    if filter_fn is not None:
        places = [p for p in places if filter_fn(p.name, p.module)]
    if names is None and only is None:
        places += [named(name, modules) for name in more]
    if not places:
        raise ValueError(
            f"nothing to normalise: no layer of {type(model).__name__} matched; look at `names`, `filter_fn`, `only` "
            "and `model.named_modules()`"
        )
    return list({(id(p.module), p.tensor_name): p for p in places}.values())


def _shown(module_name: str, tensor_name: str) -> str:
    return module_name if tensor_name == WEIGHT else f"{module_name}.{tensor_name}".lstrip(".")


def tell_of_added(places: Iterable[Place]) -> None:
    """Say in a warning which layers get a norm that have none, where others carry one of torch's already.

    A model with torch's calls left in would compute something else than before.
    """
    carrying = {p: convert.carried(p.module) for p in places}
    added = [p.shown() for p, norms in carrying.items() if p.tensor_name not in norms]
    n = sum(norms.get(p.tensor_name, False) for p, norms in carrying.items())
    if n and added:
        more = f" and {len(added) - 3} more" if len(added) > 3 else ""
        warnings.warn(
            f"bssn_fast.apply: {n} layers carry torch's spectral norm; {', '.join(map(repr, added[:3]))}{more} "
            "had none and are normalised too from now on. only='normalized' leaves them as they are",
            stacklevel=3,
        )


def own_place(module: nn.Module, tensor_name: str, dim: int | None) -> Place:
    """Return the place of a module's own parameter; raise ValueError or IndexError if there is none such."""
    weight = _tensors(module).get(tensor_name)
    if weight is None:
        raise ValueError(f"{type(module).__name__} has no parameter named {tensor_name!r} of its own")
    if parametrize.is_parametrized(module, tensor_name):  # whose parameters may have other shapes
        place = Place("", module, tensor_name)
        weight, _ = weight_of(place, convert.find(module, place.shown(), tensor_name))
    n = weight.ndim
    if dim is not None and not -n <= dim < n:
        raise IndexError(f"{type(module).__name__}: dim must be from {-n} to {n - 1}, not {dim}")
    if dim is None and tensor_name != WEIGHT and isinstance(module, _TRANSPOSED) and n > 1:
        dim = 1  # as torch has it, whatever the parameter's name
    return Place("" if tensor_name == WEIGHT else tensor_name, module, tensor_name, None if dim is None else dim % n)


def named(name: str, modules: Mapping[str, nn.Module]) -> Place:
    """Return the place that a module's or a parameter's name means."""
    if name in modules and isinstance(modules[name], LAYER_TYPES):
        return Place(name, modules[name])
    path, _, tensor_name = name.rpartition(".")
    if path in modules and tensor_name in _tensors(modules[path]):
        return Place(path if tensor_name == WEIGHT else name, modules[path], tensor_name)
    if name in modules:
        kinds = ", ".join(t.__name__ for t in LAYER_TYPES)
        found = [f"{name}.{t}" for t, x in _tensors(modules[name]).items() if x.ndim > 1]
        hint = f"; name its parameters: {', '.join(map(repr, found))}" if found else ""
        raise ValueError(f"{name}: a {type(modules[name]).__name__} cannot be normalised, only {kinds}{hint}")
    known = [*modules, *(f"{n}.{t}".lstrip(".") for n, m in modules.items() for t in _tensors(m))]
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(f"the model has no module or parameter named {name!r}{hint}")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that a module computes with, by the names of its attributes, normalised ones included.

    Of a pruned weight there is the parameter too, `weight_orig`, of which pruning makes `weight`.
    """
    found: dict[str, Tensor] = {n: p for n, p in module._parameters.items() if p is not None}
    of_torch = convert.carried(module)
    for name in [n for n in found if n.endswith("_orig")]:
        plain = name.removesuffix("_orig")
        if plain in vars(module):
            found[plain] = found[name]
            if plain in of_torch:  # torch's hook names it so
                del found[name]
    layers = cast(Any, module).parametrizations if parametrize.is_parametrized(module) else {}
    for name, layer in layers.items():
        found.update((name, p) for p in list(layer._parameters.values())[:1] if p is not None)
    return found


def check(place: Place, *, once: bool = True) -> Norm:
    """Return what normalises the weight now; raise ValueError or TypeError if it cannot be normalised.

    once: a weight that torch normalises in another way is not taken.
    """
    norm = convert.find(place.module, place.shown(), place.tensor_name)
    if once:
        convert.refuse_second_normalization(norm, place.shown(), place.tensor_name)
    weight, dim = weight_of(place, norm)
    check_weight(weight, dim, place.shown())
    refuse_managed(place.module, place.shown())
    if is_sharded(weight):
        refuse_unfit(weight, place.shown())
    if place.dim not in (None, dim):
        raise ValueError(
            f"{place.shown()}: the weight is normalised with output dimension {dim} already, not {place.dim}; remove "
            "that normalisation first"
        )
    convert.refuse_own_normalization(place.module, weight, place.shown())
    if isinstance(norm, TorchSpectralNorm):
        convert.check_vectors(norm, place.shown())
    repeated = any(stride == 0 and size > 1 for size, stride in zip(weight.shape, weight.stride(), strict=True))
    if repeated and not convert.is_preceded(norm):
        raise ValueError(
            f"{place.shown()}: elements of the weight share memory; make it a `clone()` of itself, which has its own"
        )
    if isinstance(place.module, nn.Embedding) and place.module.max_norm is not None:
        raise ValueError(f"{place.shown()}: an embedding with max_norm rescales its weight itself; set max_norm=None")
    return norm


def weight_of(place: Place, norm: Norm) -> tuple[Tensor, int]:
    """Return the weight before normalisation and its output dimension."""
    if isinstance(norm, TorchSpectralNorm):
        return norm.weight, norm.dim
    if isinstance(norm, SpectralNormalization):
        return original_of(place.parametrizations()), norm.dim
    if isinstance(norm, Preceded) and norm.norm is not None:
        return norm.weight, norm.norm.dim
    weight = cast(Tensor, place.module._parameters[place.tensor_name]) if norm is None else norm.weight
    if place.dim is not None:
        return weight, place.dim
    return weight, int(isinstance(place.module, _TRANSPOSED) and place.tensor_name == WEIGHT)


def put(
    place: Place,
    norm: Norm,
    shared: dict[tuple[int, int], SpectralNormalization],
    done: Mapping[int, SpectralNormalization],
    settings: Settings,
) -> SpectralNormalization:
    """Put the parametrization on a weight, or new settings into the one it has; return it.

    shared: parametrizations by weight and dimension: a weight that another layer normalises gets the same one.
    done: those that have the new settings already, by id.
    settings: eps and iterations 0 stand for unset.
    """
    module, tensor_name = place.module, place.tensor_name
    weight, dim = weight_of(place, norm)
    own, of_torch = convert.own(norm), norm if isinstance(norm, TorchSpectralNorm) else None
    old = of_torch if own is None else own.settings
    settings = settings._replace(
        eps=settings.eps or (old.eps if old else 1e-12),
        n_power_iterations=settings.n_power_iterations or (old.n_power_iterations if old else 1),
    )
    if own is not None:
        if own.preceded and not convert.is_preceded(norm):  # what came before has been taken off
            own.preceded = False
            quick_access(module, tensor_name)
            watch_loading(module)
        if id(own) not in done:
            own.configure(weight, settings)
        return own
    names = [n for n in module._parameters if n not in (tensor_name, f"{tensor_name}_orig")]
    order = [tensor_name, *names] if of_torch is not None else list(module._parameters)
    if parametrize.is_parametrized(module):
        order = next((vars(p)["_order"] for p in _lists(module) if "_order" in vars(p)), order)
    known: list[Tensor] = []
    in_use = None
    if of_torch is not None:
        known, in_use = of_torch.vectors, of_torch.multiplier() if settings.kind == GAIN else None
        if of_torch.position is None:
            convert.strip(module, of_torch, tensor_name)
    elif norm is None:
        convert.drop_hooks(module, tensor_name)
    autocast = isinstance(module, _COMPUTING) and tensor_name == WEIGHT
    found = shared.get((id(weight), dim))
    if found is None:
        found = SpectralNormalization(
            weight, settings, name=place.shown(), dim=dim, autocast=autocast, known=known, in_use=in_use
        )
        found.train(module.training)
        found.preceded = convert.is_preceded(norm)
        shared[id(weight), dim] = found
    else:
        found.layers += 1
        found.autocast = found.autocast and autocast
        if id(found) not in done:
            found.configure(weight, settings)
    if of_torch is not None and of_torch.position is not None:
        place.parametrizations()[of_torch.position] = found
    elif found.preceded:
        place.parametrizations().append(found)
    else:  # registering reads the weight; `unsafe` leaves that out, and with it an iteration
        parametrize.register_parametrization(module, tensor_name, found, unsafe=True)
    vars(place.parametrizations())["_order"] = order
    if not found.preceded:
        quick_access(module, tensor_name)
        watch_loading(module)
    recurrent.follow_weights(module)
    allow_pickling(module)
    return found


def _lists(module: nn.Module) -> Iterator[ParametrizationList]:
    yield from cast(Any, module).parametrizations.values()


def normalized_places(model: nn.Module) -> list[tuple[Place, SpectralNormalization]]:
    """Return the normalised weights of a model, and what normalises them."""
    found = []
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for tensor_name in cast(Any, module).parametrizations:
            place = Place(_shown(name, tensor_name), module, tensor_name)
            found += [(place, p) for p in place.parametrizations() if isinstance(p, SpectralNormalization)]
    return found


def normalized(model: nn.Module) -> list[tuple[ParametrizationList, SpectralNormalization]]:
    """Return the same with torch's lists of parametrizations."""
    return [(place.parametrizations(), norm) for place, norm in normalized_places(model)]


def norms_by_weight(model: nn.Module) -> dict[tuple[int, int], SpectralNormalization]:
    """Return what normalises the weights of a model, by the weight's id and the output dimension."""
    return {(id(original_of(layer)), norm.dim): norm for layer, norm in normalized(model) if not norm.preceded}


def refuse_following(place: Place) -> None:
    """Raise ValueError if another parametrization changes what a spectral norm, this package's or torch's, gives."""
    if not parametrize.is_parametrized(place.module, place.tensor_name):
        return
    kinds = [type(p) for p in place.parametrizations()]
    first = next((j for j, kind in enumerate(kinds) if convert.is_spectral_norm(kind)), len(kinds) - 1) + 1
    if kinds[first:]:
        raise ValueError(
            f"{place.shown()}: {', '.join(k.__name__ for k in kinds[first:])} changes the normalised weight; take it "
            f"off first (`del layer.parametrizations.{place.tensor_name}[{first}:]`)"
        )


def refuse_others(place: Place) -> None:
    """Raise ValueError if another parametrization changes what the normalisation gets or gives."""
    refuse_following(place)
    kinds = [type(p).__name__ for p in place.parametrizations() if not isinstance(p, SpectralNormalization)]
    if kinds:
        raise ValueError(
            f"{place.shown()}: {', '.join(kinds)} computes the weight that is normalised. To make what all of them "
            f"give the plain weight: torch.nn.utils.parametrize.remove_parametrizations(layer, {place.tensor_name!r})"
        )


def check_removable(model: nn.Module, found: list[tuple[Place, SpectralNormalization]]) -> None:
    """Raise ValueError or TypeError if a normalised weight cannot become its layer's plain weight."""
    weights: dict[int, tuple[Place, SpectralNormalization]] = {}
    for place, norm in found:
        refuse_managed(place.module, place.shown())
        refuse_others(place)
        other, its = weights.setdefault(id(original_of(place.parametrizations())), (place, norm))
        if its is not norm:
            raise ValueError(
                f"{place.shown()} shares its weight with {other.shown()}, which normalises it in another way: nothing "
                "can be both. Give one of them a weight of its own before"
            )
        if sum(n is norm for _, n in found) < norm.layers:
            raise ValueError(
                f"{place.shown()} shares its weight with a layer outside; call bssn_fast.remove on a module that "
                "contains both"
            )
    for name, module in model.named_modules():
        for weight in module._parameters.values():
            if id(weight) in weights and not isinstance(module, ParametrizationList):
                raise ValueError(
                    f"{weights[id(weight)][0].shown()} shares its weight with {name or type(module).__name__}, which "
                    "does not normalise it. Give one of them a weight of its own, or call bssn_fast.apply on both"
                )


def take_off(place: Place) -> Tensor:
    """Take the parametrization off a weight; return the Parameter, which is in its old place in the module again."""
    order = vars(place.parametrizations()).get("_order", [place.tensor_name])
    convert.unparametrize(place.module, place.tensor_name)
    if not any(isinstance(p[0], SpectralNormalization) for p in _remaining(place.module)):
        stop_watching(place.module)
    recurrent.forget_weights(place.module)
    parameters: dict[str, Any] = place.module._parameters
    for name in sorted(parameters, key=lambda n: order.index(n) if n in order else len(order)):
        parameters[name] = parameters.pop(name)
    return cast(Tensor, parameters[place.tensor_name])


def _remaining(module: nn.Module) -> list[ParametrizationList]:
    return list(_lists(module)) if parametrize.is_parametrized(module) else []
