"""Weights that are kept within a spectral norm, or at one, by changing them in place after an optimizer's step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from bssn_fast.calls.arguments import check_settings, check_weight, positive
from bssn_fast.calls.estimation import estimate_vectors
from bssn_fast.calls.matrices import Matrices, check_apart, check_in_place
from bssn_fast.functional import check_memory, check_vectors
from bssn_fast.laws import AT_MOST, CONSTANT, Law
from bssn_fast.layout import fits_kernels
from bssn_fast.modules import convert
from bssn_fast.modules.places import choose, named, weight_of

Numbers = float | Sequence[float] | Mapping[str, float] | None


def project_(
    weights: Sequence[Tensor],
    vectors: Sequence[Sequence[Tensor]],
    *,
    at_most: float | Sequence[float] | None = None,
    radius: float | Sequence[float] | None = None,
    dims: int | Sequence[int] = 0,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    backend: str = "",
) -> Tensor:
    """Multiply weights, in place, by min(1, at_most / sigma) or by radius / sigma, all in one call outside of autograd.

    Args:
        weights: n >= 1 tensors of one device and one dtype, as in `bssn_fast.normalize`; dense.
        vectors: for each weight (u_out, v_out) or (u_out, v_out, u_in, v_in), as in `bssn_fast.normalize`. Updated in
            place, so that the next call begins where this one ends.
        at_most: the largest spectral norm that a weight may have (with four vectors, the mean of both); a number for
            all, or one for each.
        radius: the spectral norm that a weight gets. One of the two is given.
        dims: the output dimension, 0 or 1, of all weights or of each.
        n_power_iterations: power iterations before sigma is taken.
        eps: smallest length that a vector is divided by.
        backend: as in `bssn_fast.normalize`.

    Returns:
        sigma [n] before the change.

    Raises ValueError or TypeError for arguments that do not fit, before anything has changed.
    """
    weights, groups = list(weights), [tuple(v) for v in vectors]
    dims = [dims] * len(weights) if isinstance(dims, int) else list(dims)
    eps, n = check_settings(eps, n_power_iterations)
    if not weights or not len(weights) == len(groups) == len(dims):
        raise ValueError(f"{len(weights)} weights, {len(groups)} tuples of vectors and {len(dims)} dims do not match")
    shown = [f"weights[{j}]" for j in range(len(weights))]
    for j, (weight, group, dim, name) in enumerate(zip(weights, groups, dims, shown, strict=True)):
        _check(weight, dim, name)
        check_vectors(weights[0], weight, group, dim, j)
    check_memory(weights, groups, [], n)
    check_apart(weights, shown)
    matrices = Matrices(weights, dims, groups, _laws(shown, at_most, radius), eps=eps, backend=backend)
    matrices.run(n, change=True)
    return matrices.sigma


class Projection:
    """Projects weights again and again: one call for each dtype and device, nothing allocated, nothing waited for.

    Its vectors are computed when it is made, until sigma stands still, and follow the weights from then on. Make it
    after the model has been moved and converted; a call of one that was made before raises RuntimeError.

    Args:
        weights: a module, of which all convolution, linear and embedding weights are projected; or an optimizer, or
            parameters, of which all that have two dimensions or more are, with the first as the output.
        at_most: the largest spectral norm that a weight may have; a number for all, one for each or, for a module,
            numbers by layers' names, the other layers being left alone.
        radius: the spectral norm that a weight gets. One of the two is given.
        n_power_iterations: at each call.
        eps: smallest length that a vector is divided by.
        backend: as in `bssn_fast.apply`.

    Raises ValueError or TypeError for weights that cannot be projected, which are named.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> projection = bssn_fast.Projection(optimizer, radius=1.0)
        >>> handle = optimizer.register_step_post_hook(lambda *_: projection())
    """

    def __init__(
        self,
        weights: nn.Module | Optimizer | Iterable[Tensor],
        *,
        at_most: Numbers = None,
        radius: Numbers = None,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        backend: str = "",
    ) -> None:
        eps, self._n = check_settings(eps, n_power_iterations)
        if isinstance(weights, nn.Module):
            chosen = _of_module(weights, at_most or radius)
        else:
            weights = weights if isinstance(weights, Optimizer) else list(weights)
            chosen = {name: (p, 0) for name, p in _parameters_of(weights).items()}
        if not chosen:
            raise ValueError("there are no weights of two dimensions or more to project")
        for name, (weight, dim) in chosen.items():
            _check(weight, dim, name)
        laws = dict(zip(chosen, _laws(list(chosen), at_most, radius), strict=True))
        check_apart([weight for weight, _ in chosen.values()], list(chosen))
        self._modules, self._holders = _holders(weights, chosen) if isinstance(weights, nn.Module) else ([], [])
        self._optimizer = weights if isinstance(weights, Optimizer) else None
        self._weights = [weight for weight, _ in chosen.values()]
        self.vectors: dict[str, list[Tensor]] = {
            name: estimate_vectors(weight, dim, False, hints=[None, None], eps=eps, backend=backend)
            for name, (weight, dim) in chosen.items()
        }
        parts: dict[Any, list[str]] = {}
        for name, (weight, _) in chosen.items():
            parts.setdefault((weight.device, weight.dtype), []).append(name)
        self._parts = [
            (
                part,
                Matrices(
                    [chosen[name][0] for name in part],
                    [chosen[name][1] for name in part],
                    [self.vectors[name] for name in part],
                    [laws[name] for name in part],
                    eps=eps,
                    backend=backend,
                ),
            )
            for part in parts.values()
        ]

    def __call__(self) -> None:
        """Project the weights as they are now.

        Raises RuntimeError, before any has changed, for weights that are no longer those of the module or optimizer, or
        that were converted, moved or given another shape.
        """
        if self._optimizer is not None:
            now = _parameters_of(self._optimizer).values()
            if len(now) != len(self._weights) or not all(map(is_, now, self._weights)):
                raise RuntimeError(
                    "the optimizer has other parameters than when this Projection was made, as after add_param_group; "
                    "make a new one"
                )
        for name, parent, key, module in self._modules:
            if parent._modules.get(key) is not module:
                raise RuntimeError(f"{name}: the module is no longer where it was; make a new Projection")
        for name, module, key, weight in self._holders:
            if module._parameters.get(key) is not weight:
                raise RuntimeError(
                    f"{name}: the layer has another parameter than when this Projection was made, as after "
                    "load_state_dict(assign=True) or fully_shard; make a new one"
                )
        for _, matrices in self._parts[1:]:
            matrices.check()  # before any changes; the first part is looked at when it runs
        for _, matrices in self._parts:
            matrices.run(self._n, change=True)

    def sigma(self) -> dict[str, Tensor]:
        """Return each weight's spectral norm before the last call changed it, as scalar tensors."""
        return {name: s for part, matrices in self._parts for name, s in zip(part, matrices.sigma.clone(), strict=True)}


def _of_module(model: nn.Module, numbers: Numbers) -> dict[str, tuple[Tensor, int]]:
    found: dict[str, tuple[Tensor, int]] = {}
    seen: set[tuple[int, int]] = set()
    for place in choose(model, list(numbers) if isinstance(numbers, Mapping) else None, None):
        norm = convert.find(place.module, place.shown(), place.tensor_name)
        if isinstance(norm, convert.Preceded):
            raise ValueError(
                f"{place.shown()}: the weight is computed by other parametrizations, and there is nothing to change in "
                "place; give the other layers' names"
            )
        if norm is not None:
            raise ValueError(
                f"{place.shown()}: the weight is normalised already, which leaves nothing to project; give the other "
                "layers' names, or call bssn_fast.remove"
            )
        weight, dim = weight_of(place, norm)
        if isinstance(numbers, Mapping) or (id(weight), dim) not in seen:  # a shared weight is projected once
            found[place.name] = weight, dim
            seen.add((id(weight), dim))
    if isinstance(numbers, Mapping):  # under the names that were given
        modules = dict(model.named_modules())
        return {name: found[named(name, modules).name] for name in numbers}
    return found


def _holders(
    model: nn.Module, chosen: Mapping[str, tuple[Tensor, int]]
) -> tuple[list[tuple[str, nn.Module, str, nn.Module]], list[tuple[str, nn.Module, str, Tensor]]]:
    """Return where the chosen weights are found: modules that lead to them, and weights, beside names for messages.

    Of each the module that has it, and under which name.
    """
    names = {id(weight): name or type(model).__name__ for name, (weight, _) in chosen.items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    weights: list[tuple[str, nn.Module, str, Tensor]] = []
    paths: set[str] = set()
    for path, module in modules.items():
        for key, weight in module._parameters.items():
            if weight is not None and id(weight) in names:
                weights.append((names[id(weight)], module, key, weight))
                parts = path.split(".") if path else []
                paths.update(".".join(parts[: n + 1]) for n in range(len(parts)))
    on_the_way = []
    for path in sorted(paths):
        parent, _, key = path.rpartition(".")
        on_the_way.append((path, modules[parent], key, modules[path]))
    return on_the_way, weights


def _parameters_of(weights: Optimizer | Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the parameters of two dimensions or more, by names that count all parameters."""
    groups = weights.param_groups if isinstance(weights, Optimizer) else [{"params": list(weights)}]
    parameters = [p for group in groups for p in group["params"]]
    return {f"parameters[{j}]": p for j, p in enumerate(parameters) if p.ndim > 1}


def _check(weight: Tensor, dim: int, name: str) -> None:
    check_weight(weight, dim, name)
    if not fits_kernels(weight, dim):
        raise ValueError(f"{name}: only real weights with output dimension 0 or 1 are projected; leave it out")
    check_in_place(weight, name)


def _laws(names: Sequence[str], at_most: Numbers, radius: Numbers) -> list[Law]:
    if (at_most is None) == (radius is None):
        raise ValueError("give one of at_most and radius")
    kind, argument = (CONSTANT, "radius") if at_most is None else (AT_MOST, "at_most")
    given: Any = radius if at_most is None else at_most
    if isinstance(given, Mapping):
        if given.keys() != set(names):
            raise TypeError(f"{argument} by names goes with a module; give a number, or one for each weight")
        return [Law(kind, positive(given[name], f"{argument}[{name!r}]")) for name in names]
    numbers = list(given) if isinstance(given, (list, tuple)) else [given] * len(names)
    if len(numbers) != len(names):
        raise ValueError(f"{argument} has {len(numbers)} values for {len(names)} weights")
    return [Law(kind, positive(number, argument)) for number in numbers]
