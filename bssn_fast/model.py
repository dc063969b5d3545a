"""The public verbs, for whole models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from bssn_fast import backends
from bssn_fast.backends import Backend
from bssn_fast.calls.arguments import check_module, check_settings, whole_number
from bssn_fast.layout import ONE
from bssn_fast.modules import sharing
from bssn_fast.modules.advice import Advice
from bssn_fast.modules.assignment import Learned, Numbers, check_laws, laws_of
from bssn_fast.modules.blocks import checked_blocks, stacks_of
from bssn_fast.modules.call import Caller
from bssn_fast.modules.changes import all_or_nothing
from bssn_fast.modules.convert import Norm
from bssn_fast.modules.group import Group, groups_of
from bssn_fast.modules.lists import original_of
from bssn_fast.modules.parametrization import SpectralNormalization
from bssn_fast.modules.places import (
    Place,
    check,
    check_removable,
    choose,
    normalized,
    normalized_places,
    norms_by_weight,
    own_place,
    put,
    take_off,
    tell_of_added,
    weight_of,
)
from bssn_fast.modules.settings import VARIANTS, Settings
from bssn_fast.tracing import recording

Model = TypeVar("Model", bound=nn.Module)
Variant = Literal["sn", "ssn", "bsn", "bssn"]
"""What weights are divided by, and whether the result is scaled; see `apply`."""
Update = Literal["forward", "access"]
"""When the power iteration runs in training: once in each call of the model, or at each read of a weight."""


def apply(
    model: Model,
    variant: Variant = "bssn",
    *,
    scale: Numbers = None,
    at_most: Numbers = None,
    gain: Learned = None,
    blocks: Mapping[str, int] | None = None,
    n_power_iterations: int | None = None,
    eps: float | None = None,
    names: Iterable[str] | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    only: str | None = None,
    update: Update = "forward",
    backend: Backend = "",
    gradient_groups: int = 1,
    sharded: str = "auto",
) -> Model:
    """Divide the weights of a model's layers by their spectral norms, in place.

    Takes all convolution, transposed convolution, linear and embedding layers, or those that `names` or `filter_fn`
    choose. Layers that carry one of torch's spectral norms are converted with their vectors; other parametrizations of
    the same weight stay where they are. A weight that others compute, as a mask or LoRA does, is normalised after them,
    by itself and at each read. Layers normalised by an earlier `apply`, and parameters that were named to it, get the
    new settings. Parameters stay the same objects: an optimizer built before stays valid. A Parameter that several
    layers share is normalised once, with the vectors of the first.

    Complex weights, weights of one dimension, and converted weights whose output dimension is neither 0 nor 1 are
    normalised one by one, in plain torch operations.

    Draws random numbers as torch does: for each new layer, in the model's order, one `normal_` for u and one for v.
    Variants with two directions then draw one for each vector of the input side.

    Args:
        model: the module that your training loop calls. Each call normalises all its layers together.
        variant: "sn": W / s_out. "ssn": c W / s_out. "bsn": W / mean(s_out, s_in). "bssn": c W / mean(s_out, s_in).
            s_out and s_in are the largest singular values of W unfolded as [c_out, c_in k] and as [c_in, c_out k].
        scale: the constant c of "ssn" and "bssn", sqrt(2) by default. The paper tries 0.7 to 4.0 on CIFAR10. A number,
            or numbers by layers' names, as in `names`; the other layers then have the default.
        at_most: an upper bound of the spectral norm, for "sn", or of the mean of both, for "bsn": the weight becomes
            min(1, at_most / sigma) W, and stays as it is while sigma is no larger. A number, or numbers by names; the
            other layers then have the variant's own law. Of a layer with blocks it is the bound of each, and may be a
            list of numbers, as `scale` may be.
        gain: "learn" gives each layer, of "sn" or "bsn", a Parameter gamma [1] and the weight gamma W / sigma, or does
            so for the layers in a list of names. It is made such that the weight does not change, and is called
            `parametrizations.weight.0.gain` in the layer's `state_dict`. An optimizer has to be made after `apply` to
            train it. With n blocks it is [n].
        blocks: of layers and parameters by name, as in `names`: how many matrices the weight holds, as equal parts of
            its first dimension, {"attention.in_proj_weight": 3} for queries, keys and values. Each is divided by a
            sigma of its own. A parameter [n, c_out, ...] that is no convolution's weight holds n matrices, and its
            first dimension only numbers them. Parameters that are named here are normalised too, unless `names` or
            `only` chooses. A layer keeps its blocks when it is normalised anew.
        n_power_iterations: at each normalisation in training. By default 1, or that of a converted layer.
        eps: smallest length that a vector is divided by. By default 1e-12, or that of a converted layer.
        names: only these layers, as in `model.named_modules()`, or single parameters of any module, as in
            `model.named_parameters()`: "lstm.weight_hh_l0", "attention.in_proj_weight". Their first dimension is the
            output; a parameter of one dimension is divided by its length.
        filter_fn: called with the name and module of each layer; returns whether to normalise it.
        only: "normalized" takes just the layers, and other parameters, that carry a spectral norm already, torch's or
            an earlier one of this package. Without it, `names` and `filter_fn`, a warning says which layers were added
            to those that carry torch's.
        update: "forward" iterates once in each call of the model. "access" is torch's rule: it iterates each time that
            a weight is read in training mode, which differs where a layer is used twice in one call.
        backend: "reference", "cpu", "triton" or "cuda"; empty for the default of the weights' device.
        gradient_groups: compute the gradients of the weights in at most this many calls. With one, all are ready at
            the end of the backward pass. With more, those of the last layers are ready earlier, so that
            DistributedDataParallel sends them while the backward pass goes on.
        sharded: where sigma of weights that FSDP2 shards is computed: "gather", of the whole weight on each rank, once
            it is gathered; "reduce", of the shards, in two small messages for each power iteration when the model is
            called; "auto", the latter for weights that are sharded by tensor parallelism too.
            docs/howto/distributed.md has the costs.

    Returns:
        The model.

    Raises ValueError, TypeError or BackendUnavailableError for settings out of range, when no layer matches, and for
    layers that cannot be normalised, which the message names. The model is then unchanged.

    Examples:
        >>> d = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.LazyLinear(1))
        >>> _ = d(torch.zeros(1, 3, 8, 8))
        >>> d = bssn_fast.apply(d, "bssn", scale=1.2)
    """
    check_module(model, "apply")
    settings = _settings(variant, n_power_iterations, eps, update, backend, gradient_groups, sharded)
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            "call bssn_fast.apply before wrapping in DistributedDataParallel, which keeps only those buffers equal on "
            "all ranks that are there when it is made"
        )
    divided = checked_blocks(blocks)
    places = choose(model, names, filter_fn, only, more=divided)
    existing = {}
    for place in places:
        existing[place] = check(place)
        backends.get(backend, weight_of(place, existing[place])[0].device)
    stacks = stacks_of(model, existing, divided)
    laws = laws_of(model, stacks, variant, scale=scale, at_most=at_most, gain=gain)
    check_laws(laws, stacks, existing)
    if sharded == "reduce" and any(stack != ONE for stack in stacks.values()):
        raise ValueError("blocks are normalised once the weight is gathered; use sharded='auto' or 'gather'")
    if names is None and filter_fn is None and only is None:
        tell_of_added([place for place in places if stacks[place] == ONE])
    with all_or_nothing(model):
        told = {p: settings._replace(kind=law.kind, scale=law.number, stack=stacks[p]) for p, law in laws.items()}
        _put_on(model, existing, told)
    return model


def spectral_norm(
    module: Model, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> Model:
    """Normalise one parameter of a module, as torch.nn.utils.parametrizations.spectral_norm does.

    Takes that function's arguments, and gives its results and `state_dict`. Each read of the parameter in training mode
    iterates. `apply` on a whole model is faster, as it normalises all layers together.

    Draws random numbers as `apply` does. On a parameter that is normalised already, by this function or by `apply`, it
    sets variant "sn" and these settings, where torch would normalise the result once more.

    Args:
        module: the layer.
        name: the module's own parameter, of one dimension or more, real or complex. A parameter of one dimension is
            divided by its length. What other parametrizations make of it is normalised after them.
        n_power_iterations: at each read in training mode.
        eps: smallest length that a vector is divided by.
        dim: the output dimension, also negative; 0 by default, 1 for transposed convolutions.

    Returns:
        The module.

    Raises ValueError or TypeError if there is no such parameter, for settings out of range, and for what `apply`
    refuses; IndexError if there is no such dimension. The module is then unchanged.

    Examples:
        >>> layer = bssn_fast.spectral_norm(torch.nn.Linear(20, 40))
    """
    check_module(module, "spectral_norm")
    settings = _settings("sn", n_power_iterations, eps, "access", "", 1, "auto")
    place = own_place(module, name, dim)
    existing = {place: check(place, once=False)}
    stacks = stacks_of(module, existing, {})
    with all_or_nothing(module):
        _put_on(module, existing, {place: settings._replace(stack=stacks[place])})
    return module


def _put_on(model: nn.Module, existing: dict[Place, Norm], settings: dict[Place, Settings]) -> None:
    """Put the normalisation on all places, and the hooks on the model."""
    shared = norms_by_weight(model)
    norms: dict[int, SpectralNormalization] = {}
    for place, its_settings in settings.items():
        norm = put(place, existing[place], shared, norms, its_settings)
        norms[id(norm)] = norm
    lists = {id(norm): layer for layer, norm in normalized(model) if id(norm) in norms and not norm.preceded}
    for key, layer in lists.items():
        norms[key].begin_with(original_of(layer))  # parametrize has touched weights
    groups: list[Caller] = list(groups_of(model))
    update = next(iter(settings.values())).update
    if update == "access":  # not part of any model's calls
        groups = list(dict.fromkeys([*groups, *(g for norm in norms.values() for g in norm.groups)]))
    for group in groups:
        group.discard(norms.values())
    if update == "forward" and lists:
        Group(lists.values()).hook(model.module if isinstance(model, nn.DataParallel) else model)
    told: set[str] = set()
    for norm in norms.values():
        if not norm.groups:
            norm.advice = Advice(told)


def _settings(
    variant: str,
    n_power_iterations: int | None,
    eps: float | None,
    update: str,
    backend: str,
    gradient_groups: int,
    sharded: str,
) -> Settings:
    """Return the settings, iterations and eps 0 if unset, of the law W / sigma; raise ValueError for bad ones."""
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; choose one of {', '.join(map(repr, VARIANTS))}")
    if update not in get_args(Update):
        raise ValueError(f"update must be 'forward' or 'access', not {update!r}")
    if sharded not in ("auto", "gather", "reduce"):
        raise ValueError(f"sharded must be 'auto', 'gather' or 'reduce', not {sharded!r}")
    groups = whole_number(gradient_groups)
    if groups < 1:
        raise ValueError(f"gradient_groups must be a whole number of at least 1, not {gradient_groups!r}")
    smallest, n = check_settings(
        1e-12 if eps is None else eps,
        1 if n_power_iterations is None else n_power_iterations,
        fewest=1,
    )
    n, smallest = 0 if n_power_iterations is None else n, 0.0 if eps is None else smallest
    return Settings(variant, 1.0, smallest, n, update, backend, groups, sharded)


def _normalized_layers(model: nn.Module, function: str) -> list[tuple[Place, SpectralNormalization]]:
    check_module(model, function)
    found = normalized_places(model)
    if not found:
        raise ValueError(f"no layer of {type(model).__name__} is normalised; call bssn_fast.apply(model) first")
    return found


def cached(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Share one normalisation among all calls of the model and its layers in a `with` block.

    The first call iterates, if in training mode. Later calls, in either mode, use its weights and its graph: run one
    backward pass over the sum of the losses, or use `retain_graph=True`. A weight that changes inside the block, in
    whatever way, is normalised again. On a GPU and in compiled code, calls share the power iteration only: looking for
    changes would mean to wait for the GPU.

    `torch.nn.utils.parametrize.cached()` does the same for all models.

    Raises ValueError if no layer of the model is normalised.
    """
    norms = list({id(p): p for _, p in _normalized_layers(model, "cached")}.values())
    return recording.Share(norms) if is_dynamo_compiling() else sharing.share(norms)


def sigma(model: nn.Module) -> dict[str, Tensor]:
    """Return for each layer what its weight was last divided by, as scalar tensors; [n] of n blocks. Computes nothing.

    After a compiled call, and one of DataParallel, sigma is computed, from the weight and the vectors as they are now.

    Raises ValueError if no layer of the model is normalised.
    """
    found = _normalized_layers(model, "sigma")
    known = [p.measured.own() for _, p in found]
    return {
        place.name: p.sigma_of(place.weight_before(p)) if its is None else its
        for (place, p), its in zip(found, known, strict=True)
    }


def summary(model: nn.Module) -> str:
    """Return a table of the normalised layers, and blocks: name, type, shape of the weight, variant and sigma.

    Raises ValueError if no layer of the model is normalised.
    """
    rows = [("layer", "type", "weight", "variant", "sigma")]
    for place, p in _normalized_layers(model, "summary"):
        kind = type(place.module).__name__.removeprefix("Parametrized")
        weight, stack = place.weight_before(p), p.settings.stack
        shape = "x".join(map(str, stack.shape(weight.shape)))
        sigmas = p.sigma_of(weight).reshape(-1).tolist()
        for j, (shown, its_sigma) in enumerate(zip(p.settings.shown(), sigmas, strict=True)):
            rows.append((f"{place.name or '(model)'}{stack.suffix(j)}", kind, shape, shown, f"{its_sigma:.4g}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def remove(model: Model) -> Model:
    """Make the normalised weights plain weights, as evaluation computes them. Parameters stay the same objects.

    Raises ValueError if no layer of the model is normalised.
    """
    found = _normalized_layers(model, "remove")
    check_removable(model, found)
    parameters = {id(p): original_of(place.parametrizations()) for place, p in found}
    norms = [p for _, p in found]
    with all_or_nothing(model, parameters.values()):
        baked = {key: p.as_in_evaluation(parameters[key]) for key, p in {id(p): p for p in norms}.items()}
        for group in dict.fromkeys([*groups_of(model), *(g for p in norms for g in p.groups)]):  # a copy's may be new
            group.discard(norms)
        for place, _ in found:
            take_off(place)
        with torch.no_grad():
            for key, weight in parameters.items():
                weight.copy_(baked[key])
    return model
