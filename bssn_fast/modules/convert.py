"""Weights that something already computes: torch's two spectral norms are taken over, others stay or are refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook

from bssn_fast import reference
from bssn_fast.calls.estimation import are_units
from bssn_fast.layout import compute_dtype, vector_sizes
from bssn_fast.modules.lists import parametrizations_of, weight_before
from bssn_fast.modules.parametrization import SpectralNormalization

WEIGHT = "weight"


@dataclass
class TorchSpectralNorm:
    """What is known of a spectral norm of torch that a layer carries."""

    hook: SpectralNorm | None  # torch.nn.utils.spectral_norm, else the parametrization of the same name
    weight: Tensor
    vectors: list[Tensor]  # u and v; none for a weight of one dimension
    dim: int
    eps: float
    n_power_iterations: int
    position: int | None = None  # among other parametrizations, which stay

    def multiplier(self) -> Tensor:
        """Return 1 / sigma, as in evaluation."""
        w = self.weight.detach()
        w = w.to(compute_dtype(w.dtype))
        vectors = tuple([v.detach().to(w.device, w.dtype) for v in self.vectors])
        return reference.multiplier(reference.spectral_norm(w, vectors, self.dim), 1.0)


@dataclass
class Preceded:
    """A weight that other parametrizations compute, and the normalisation after them, if there is one."""

    weight: Tensor  # as `weight_before` gives it
    norm: SpectralNormalization | None
    others: list[nn.Module]


Norm = SpectralNormalization | TorchSpectralNorm | Preceded | None
"""What is found on a weight; None for a plain parameter."""


def own(norm: Norm) -> SpectralNormalization | None:
    """Return the normalisation of this package, if that is what was found."""
    if isinstance(norm, Preceded):
        return norm.norm
    return norm if isinstance(norm, SpectralNormalization) else None


def is_preceded(norm: Norm) -> bool:
    """Whether other parametrizations compute the weight that is normalised."""
    return isinstance(norm, Preceded) or (isinstance(norm, TorchSpectralNorm) and bool(norm.position))


def find(module: nn.Module, name: str, tensor_name: str = WEIGHT) -> Norm:
    """Return what is found on a weight of the module; raise ValueError if something sits there that cannot stay."""
    if parametrize.is_parametrized(module, tensor_name):
        return _among(parametrizations_of(module, tensor_name))
    for hook in module._forward_pre_hooks.values():
        if getattr(hook, "name", None) != tensor_name:
            continue
        if type(hook) is not SpectralNorm:  # a subclass may compute something else
            of_torch = isinstance(hook, SpectralNorm)
            undo = "spectral_norm, which keeps the normalised weight" if of_torch else "weight_norm for weight_norm"
            raise ValueError(
                f"{name}: the weight already carries {type(hook).__name__}; remove it first "
                f"(torch.nn.utils.remove_{undo}), or leave the layer out"
            )
        weight = module._parameters.get(f"{tensor_name}_orig")
        if weight is None:
            raise ValueError(
                f"{name}: the weight that torch's spectral norm divides, {tensor_name}_orig, is not a parameter of the "
                "layer; undo what computes it first (torch.nn.utils.prune.remove for a pruned one), or leave it out"
            )
        vectors = [cast(Tensor, module._buffers[f"{tensor_name}_{name}"]) for name in "uv"] if weight.ndim > 1 else []
        return TorchSpectralNorm(hook, weight, vectors, hook.dim % weight.ndim, hook.eps, hook.n_power_iterations)
    if module._parameters.get(tensor_name) is None:
        raise ValueError(
            f"{name}: the weight is not a parameter of the layer; undo what replaced it first "
            "(torch.nn.utils.prune.remove for a pruned layer), or leave the layer out"
        )
    return None


def _among(layer: ParametrizationList) -> Norm:
    found = list(layer)
    of_torch = [j for j, p in enumerate(found) if type(p) is _SpectralNorm]  # a subclass may compute something else
    ours = [j for j, p in enumerate(found) if isinstance(p, SpectralNormalization)]
    position = [*ours, *of_torch, len(found)][0]
    norm: Any = found[position] if position < len(found) else None
    if isinstance(norm, SpectralNormalization) and position == 0:
        return norm
    weight = weight_before(layer, position)
    if norm is None or isinstance(norm, SpectralNormalization):
        return Preceded(weight, norm, found[:position])
    vectors = [norm._u, norm._v] if weight.ndim > 1 else []
    # Some versions of torch keep the dimension as a negative number where it was given as one.
    settings = norm.dim % weight.ndim, norm.eps, getattr(norm, "n_power_iterations", 1)  # not there for one dimension
    return TorchSpectralNorm(None, weight, vectors, *settings, position=position if len(found) > 1 else None)


def refuse_second_normalization(norm: Norm, name: str, tensor_name: str) -> None:
    """Raise ValueError for a weight that carries another normalisation, and no spectral norm that says it is meant."""
    if not isinstance(norm, Preceded) or norm.norm is not None:
        return
    kinds = [type(p).__name__.lstrip("_") for p in norm.others if isinstance(p, _NORMALIZATIONS)]
    if kinds:
        raise ValueError(
            f"{name}: the weight already carries {', '.join(kinds)}; call "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor_name!r}) first, or leave the layer "
            "out. If both are meant, bssn_fast.spectral_norm(layer) normalises what it gives"
        )


_NORMALIZATIONS = (_WeightNorm, _Orthogonal, _SpectralNorm)


def is_spectral_norm(kind: type) -> bool:
    """Whether parametrizations of this type are this package's, or torch's spectral norm."""
    return kind in (SpectralNormalization, _SpectralNorm)


def carried(module: nn.Module) -> dict[str, bool]:
    """Return the names of a module's tensors that carry a spectral norm, and whether it is torch's."""
    found = {h.name: True for h in module._forward_pre_hooks.values() if type(h) is SpectralNorm}
    if parametrize.is_parametrized(module):
        for name in cast(Any, module).parametrizations:
            kinds = {type(p) for p in parametrizations_of(module, name)}
            if any(map(is_spectral_norm, kinds)):
                found[name] = SpectralNormalization not in kinds
    return found


def refuse_own_normalization(module: nn.Module, weight: Tensor, name: str) -> None:
    """Raise ValueError for a layer whose class has a `forward` that divides the weight by its spectral norm itself.

    Many published GANs have such layers. They are known by a buffer of theirs that is a singular vector of the weight:
    it has the size of one, and the name or the length.
    """
    kind = type(module)
    if (getattr(kind.forward, "__module__", None) or "").startswith("torch.") or weight.ndim < 2:
        return
    hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, SpectralNorm)]
    not_its_own = {f"{hook.name}_{x}" for hook in hooks for x in "uv"}
    sizes = {size for dim in (0, 1) for size in vector_sizes(weight.shape, dim, False)}
    for buffer_name, buffer in module._buffers.items():
        if buffer is None or buffer_name in not_its_own or buffer.numel() not in sizes:
            continue
        if max(buffer.shape, default=0) == buffer.numel() and (_VECTOR.search(buffer_name) or _is_unit(buffer)):
            raise ValueError(
                f"{name}: {kind.__name__}.forward seems to normalise the weight itself, with its buffer "
                f"{buffer_name!r}: to normalise it before has no effect. Put the plain layer in its place "
                "(torch.nn.Conv2d, torch.nn.Linear, ...), or leave the layer out"
            )


_VECTOR = re.compile(r"(^|_)[uv]\d*$")


def _is_unit(buffer: Tensor) -> bool:
    if buffer.is_meta or buffer.numel() == 1 or not buffer.is_floating_point():
        return False
    return are_units([buffer.detach().flatten()])[0]


def check_vectors(norm: TorchSpectralNorm, name: str) -> None:
    """Raise ValueError if u and v do not belong to the weight's shape."""
    found, sizes = [tuple(v.shape) for v in norm.vectors], vector_sizes(norm.weight.shape, norm.dim, False)
    if found != [(size,) for size in sizes]:
        raise ValueError(
            f"{name}: u and v of shapes {found} do not fit a weight of shape {tuple(norm.weight.shape)}, which needs "
            f"sizes {sizes}; remove torch's spectral norm, and apply again"
        )


def unparametrize(module: nn.Module, tensor_name: str) -> None:
    """Make the weight before normalisation a plain parameter again."""
    # Copies made by deepcopy share the class that parametrize made, whose property of the weight will be deleted.
    kind = type(module)
    module.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
    parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=False)


def drop_hooks(module: nn.Module, tensor_name: str) -> None:
    """Remove the hooks of torch's spectral norm, and the one of loading that `remove_spectral_norm` leaves behind."""
    for hooks, kind in (
        (module._forward_pre_hooks, SpectralNorm),
        (module._state_dict_hooks, SpectralNormStateDictHook),
        (module._load_state_dict_pre_hooks, SpectralNormLoadStateDictPreHook),
    ):
        for key, hook in list(hooks.items()):
            inner = getattr(hook, "hook", hook)  # torch wraps pre-hooks of state dicts
            if isinstance(inner, kind) and getattr(getattr(inner, "fn", inner), "name", None) == tensor_name:
                del hooks[key]


def strip(module: nn.Module, norm: TorchSpectralNorm, tensor_name: str) -> None:
    """Take torch's spectral norm off a layer: the weight before normalisation becomes its plain parameter."""
    if norm.hook is None:
        unparametrize(module, tensor_name)
        return
    drop_hooks(module, tensor_name)
    delattr(module, tensor_name)
    del (
        module._parameters[f"{tensor_name}_orig"],
        module._buffers[f"{tensor_name}_u"],
        module._buffers[f"{tensor_name}_v"],
    )
    module.register_parameter(tensor_name, cast(nn.Parameter, norm.weight))
