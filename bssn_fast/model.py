"""The public verbs, for whole models."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bssn_fast import backends, convert
from bssn_fast.checkpoint import stop_watching, watch_loading
from bssn_fast.convert import WEIGHT, TorchSpectralNorm
from bssn_fast.functional import check_settings, check_weight
from bssn_fast.group import Group, groups_of
from bssn_fast.parametrization import (
    VARIANTS,
    Settings,
    SpectralNormalization,
    Usage,
    original_of,
    parametrizations_of,
    quick_access,
)
from bssn_fast.sharded import refuse_managed

Model = TypeVar("Model", bound=nn.Module)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_COMPUTING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
LAYER_TYPES = (*_COMPUTING, nn.Embedding)
"""The layers that `apply` normalises."""

DEFAULT_SCALE = 2**0.5
"""The gain that Kaiming's initialisation has for ReLU."""


def apply(
    model: Model,
    variant: str = "bssn",
    *,
    scale: float | None = None,
    n_power_iterations: int | None = None,
    eps: float | None = None,
    names: Iterable[str] | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    update: str = "forward",
    backend: str = "",
    gradient_groups: int = 1,
) -> Model:
    """Normalise the weights of a model's layers by their spectral norms, in place.

    All convolutions, transposed convolutions, linear and embedding layers are normalised, or those that `names` or
    `filter_fn` choose. Layers that carry one of torch's spectral norms are converted with their vectors; layers
    normalised by an earlier `apply` get the new settings. Parameters stay the same objects, so that an optimizer built
    before remains valid.

    Draws from torch's random generator: for each new layer in the model's order a normal_ for u and one for v, as torch
    does, and then, for two directions, one for each of the input side's.

    Args:
        model: the module whose forward is called in training: its layers are then normalised together, once a call.
        variant: "sn" W / s_out, "ssn" c W / s_out, "bsn" W / mean(s_out, s_in), "bssn" c W / mean(s_out, s_in).
        scale: the constant c of "ssn" and "bssn"; sqrt(2) by default. The paper tries 0.7 to 4.0 on CIFAR10.
        n_power_iterations: at each normalisation in training; by default 1, or that of a converted layer.
        eps: smallest length that a vector is divided by; by default 1e-12, or that of a converted layer.
        names: the layers to normalise, as `model.named_modules()` calls them.
        filter_fn: called with name and module of each layer; says whether to normalise it.
        update: "forward" iterates once in each call of the model; "access" each time that a weight is read in
            training mode, torch's rule.
        backend: "reference", "cpu", "triton" or "cuda"; empty for the default of the weights' device.
        gradient_groups: in how many calls the gradients of the weights are computed, at most. With one, all are ready
            at the end of the backward pass; with more, those of the last layers are ready earlier, so that
            DistributedDataParallel sends them while the backward pass goes on.

    Returns:
        The model.

    Raises ValueError, TypeError or BackendUnavailableError, the model being unchanged, for settings out of range, when
    no layer matches, and for layers that cannot be normalised, which are named.

    Example:
        >>> d = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.LazyLinear(1))
        >>> _ = d(torch.zeros(1, 3, 8, 8))
        >>> d = bssn_fast.apply(d, "bssn", scale=1.2)
    """
    scale = _check_arguments(variant, scale, update, eps, n_power_iterations, gradient_groups)
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            "call bssn_fast.apply before wrapping in DistributedDataParallel, which keeps only those buffers equal on "
            "all ranks that are there when it is made"
        )
    layers = _choose_layers(model, names, filter_fn)
    existing = {}
    for name, module in layers:
        shown = name or type(module).__name__
        existing[name] = convert.find(module, shown)
        weight, dim = _weight_of(module, existing[name])
        check_weight(weight, dim, shown)
        refuse_managed(module, shown)
        _check_layer(module, weight, shown)
        backends.get(backend, weight.device)

    together = Usage(len(layers))
    for name, module in layers:
        settings = Settings(variant, scale, eps or 0, n_power_iterations or 0, update, backend, gradient_groups)
        _normalize_layer(module, existing[name], settings, together if update == "forward" else Usage(1))
    lists = [parametrizations_of(module, WEIGHT) for _, module in layers]
    for group in list(groups_of(model)):
        group.discard(lists)
    if update == "forward":
        Group(lists, together).hook(model)
    return model


def _check_arguments(
    variant: str,
    scale: float | None,
    update: str,
    eps: float | None,
    n_power_iterations: int | None,
    gradient_groups: int,
) -> float:
    """Return the scale to use; raise ValueError for settings out of range."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; choose one of {', '.join(map(repr, VARIANTS))}")
    scaled = VARIANTS[variant][1]
    if scale is not None and not scaled:
        raise ValueError(f"variant {variant!r} has no scale; choose {'ssn' if variant == 'sn' else 'bssn'!r} for one")
    if update not in ("forward", "access"):
        raise ValueError(f"update must be 'forward' or 'access', not {update!r}")
    if isinstance(gradient_groups, bool) or not isinstance(gradient_groups, int) or gradient_groups < 1:
        raise ValueError(f"gradient_groups must be a whole number of at least 1, not {gradient_groups!r}")
    scale = float(scale if scale is not None else DEFAULT_SCALE if scaled else 1.0)
    check_settings(
        scale, 1e-12 if eps is None else eps, 1 if n_power_iterations is None else n_power_iterations, fewest=1
    )
    return scale


def _choose_layers(
    model: nn.Module, names: Iterable[str] | None, filter_fn: Callable[[str, nn.Module], bool] | None
) -> list[tuple[str, nn.Module]]:
    modules = dict(model.named_modules())
    if names is None:
        chosen = [(n, m) for n, m in modules.items() if isinstance(m, LAYER_TYPES)]
    else:
        if isinstance(names, str):
            raise TypeError(f"names must be a list of layer names; write names=[{names!r}]")
        chosen = []
        for name in names:
            if name not in modules:
                close = difflib.get_close_matches(name, modules, n=3)
                hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
                raise ValueError(f"the model has no module named {name!r}{hint}")
            if not isinstance(modules[name], LAYER_TYPES):
                kinds = ", ".join(t.__name__ for t in LAYER_TYPES)
                raise ValueError(f"{name}: a {type(modules[name]).__name__} cannot be normalised, only {kinds}")
            chosen.append((name, modules[name]))
    if filter_fn is not None:
        chosen = [(n, m) for n, m in chosen if filter_fn(n, m)]
    if not chosen:
        raise ValueError(
            f"nothing to normalise: no layer of {type(model).__name__} matched; look at `names`, `filter_fn` and "
            "`model.named_modules()`"
        )
    return list(dict(chosen).items())


def _weight_of(module: nn.Module, norm: SpectralNormalization | TorchSpectralNorm | None) -> tuple[Tensor, int]:
    """Return the weight before normalisation and its output dimension."""
    if isinstance(norm, TorchSpectralNorm):
        return norm.weight, norm.dim
    if isinstance(norm, SpectralNormalization):
        return original_of(parametrizations_of(module, WEIGHT)), norm.dim
    return cast(Tensor, module._parameters[WEIGHT]), int(isinstance(module, _TRANSPOSED))


def _check_layer(module: nn.Module, weight: Tensor, name: str) -> None:
    if any(stride == 0 and size > 1 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
        raise ValueError(
            f"{name}: elements of the weight share memory; make it a `clone()` of itself, which has its own"
        )
    if isinstance(module, nn.Embedding):
        if module.sparse:
            raise ValueError(f"{name}: an embedding with sparse gradients cannot be normalised; set sparse=False")
        if module.max_norm is not None:
            raise ValueError(f"{name}: an embedding with max_norm rescales its weight itself; set max_norm=None")


def _normalize_layer(
    module: nn.Module, norm: SpectralNormalization | TorchSpectralNorm | None, settings: Settings, usage: Usage
) -> None:
    """Put the parametrization on a layer, or new settings into the one it has. eps and iterations 0 stand for unset."""
    weight, dim = _weight_of(module, norm)
    old = norm.settings if isinstance(norm, SpectralNormalization) else norm
    settings = settings._replace(
        eps=settings.eps or (old.eps if old else 1e-12),
        n_power_iterations=settings.n_power_iterations or (old.n_power_iterations if old else 1),
    )
    if isinstance(norm, SpectralNormalization):
        norm.configure(weight, settings, usage)
        return
    known: list[Tensor] = []
    if norm is not None:
        known = [norm.u, norm.v]
        convert.strip(module, norm)
    autocast = isinstance(module, _COMPUTING)
    parametrization = SpectralNormalization(weight, settings, dim=dim, autocast=autocast, usage=usage, known=known)
    parametrization.train(module.training)
    # Registering reads the weight; `unsafe` leaves that out, and with it an iteration.
    parametrize.register_parametrization(module, WEIGHT, parametrization, unsafe=True)
    quick_access(module, WEIGHT)
    watch_loading(module)


def _normalized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, SpectralNormalization]]:
    found = False
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, WEIGHT):
            for parametrization in parametrizations_of(module, WEIGHT):
                if isinstance(parametrization, SpectralNormalization):
                    found = True
                    yield name, module, parametrization
    if not found:
        raise ValueError(f"no layer of {type(model).__name__} is normalised; call bssn_fast.apply(model) first")


@contextlib.contextmanager
def cached(model: nn.Module) -> Iterator[None]:
    """Share one normalisation among all calls of the model and its layers in the `with` block.

    The first call iterates, if in training mode; later ones, in either mode, use its weights and its graph, so that one
    backward pass over the sum of the losses (or `retain_graph=True`) belongs to them. A weight that changes in the
    block is normalised anew, unless it changes through `.data`, which torch keeps no record of.

    Raises ValueError if no layer of the model is normalised.
    """
    states = [p.state for _, _, p in _normalized_layers(model)]
    inside_call = {id(state) for state in states if state.ready is not None and not state.cached}
    for state in states:
        state.cached += 1
        state.generation += state.cached == 1  # what was kept before must not be used inside
    try:
        yield
    finally:
        for state in states:
            state.cached -= 1
            if state.cached == 0:
                state.generation += 1
                if id(state) not in inside_call:
                    state.withdraw()


def sigma(model: nn.Module) -> dict[str, Tensor]:
    """Return each layer's sigma of the last normalisation, as scalar tensors, without computing anything.

    Raises ValueError if no layer of the model is normalised.
    """
    return {name: p.state.current_sigma() for name, _, p in _normalized_layers(model)}


def summary(model: nn.Module) -> str:
    """Return a table of the normalised layers: name, type, shape of the weight, variant and sigma.

    Raises ValueError if no layer of the model is normalised.
    """
    rows = [("layer", "type", "weight", "variant", "sigma")]
    for name, module, p in _normalized_layers(model):
        kind = type(module).__name__.removeprefix("Parametrized")
        shape = "x".join(map(str, original_of(parametrizations_of(module, WEIGHT)).shape))
        variant = p.settings.variant
        if VARIANTS[variant][1]:
            variant += f" x {p.settings.scale:.4g}"
        rows.append((name or "(model)", kind, shape, variant, f"{p.state.current_sigma().item():.4g}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def remove(model: Model) -> Model:
    """Make the normalised weights, as in evaluation, the layers' plain weights; the Parameters stay the same objects.

    Raises ValueError if no layer of the model is normalised.
    """
    layers = list(_normalized_layers(model))
    for name, module, _ in layers:
        refuse_managed(module, name or type(module).__name__)
    baked = []
    with torch.no_grad():
        for _, module, p in layers:
            baked.append(p.evaluate(original_of(parametrizations_of(module, WEIGHT))))
    lists = [parametrizations_of(module, WEIGHT) for _, module, _ in layers]
    for group in list(groups_of(model)):
        group.discard(lists)
    for (_, module, p), normalized in zip(layers, baked, strict=True):
        convert.unparametrize(module)
        stop_watching(module)
        p.settings = p.settings._replace(update="access")  # for the group of a model around this one, if there is one
        parameters: dict[str, Any] = module._parameters
        with torch.no_grad():
            parameters[WEIGHT].copy_(normalized)
        for name in [n for n in parameters if n != WEIGHT]:  # the weight comes first again
            parameters[name] = parameters.pop(name)
    return model
