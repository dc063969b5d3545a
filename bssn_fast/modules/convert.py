"""Layers that already carry a normalisation: torch's two spectral norms are taken over, others are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook

from bssn_fast.layout import vector_sizes
from bssn_fast.modules.parametrization import SpectralNormalization, original_of, parametrizations_of

WEIGHT = "weight"


@dataclass
class TorchSpectralNorm:
    """What is known of a spectral norm of torch that a layer carries."""

    hook: SpectralNorm | None  # torch.nn.utils.spectral_norm, else the parametrization of the same name
    weight: nn.Parameter
    u: Tensor
    v: Tensor
    dim: int
    eps: float
    n_power_iterations: int


def find(module: nn.Module, name: str, tensor_name: str = WEIGHT) -> SpectralNormalization | TorchSpectralNorm | None:
    """Return the spectral norm on a weight of the module; raise ValueError if something else sits there."""
    if parametrize.is_parametrized(module, tensor_name):
        parametrizations = parametrizations_of(module, tensor_name)
        found = list(parametrizations)
        if len(found) == 1 and isinstance(found[0], SpectralNormalization):
            return found[0]
        if len(found) == 1 and type(found[0]) is _SpectralNorm:  # a subclass may compute something else
            old = found[0]
            if not hasattr(old, "_u"):
                raise ValueError(
                    f"{name}: torch's spectral norm of a one-dimensional weight; remove it or leave it out"
                )
            weight = cast(nn.Parameter, original_of(parametrizations))
            # torch keeps the dimension as a negative number where it was given as one.
            dim = old.dim % weight.ndim
            _check_dim(dim, name)
            return TorchSpectralNorm(None, weight, old._u, old._v, dim, old.eps, old.n_power_iterations)
        kinds = ", ".join(type(p).__name__.lstrip("_") for p in found)
        raise ValueError(
            f"{name}: the weight already carries {kinds}; call "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor_name!r}) first, or leave the layer out"
        )
    for hook in module._forward_pre_hooks.values():
        if getattr(hook, "name", None) != tensor_name:
            continue
        if type(hook) is not SpectralNorm:  # a subclass may compute something else
            raise ValueError(
                f"{name}: the weight already carries {type(hook).__name__}; remove it first "
                "(torch.nn.utils.remove_weight_norm for weight_norm), or leave the layer out"
            )
        _check_dim(hook.dim, name)
        weight = cast(nn.Parameter, module._parameters[f"{tensor_name}_orig"])
        u, v = (cast(Tensor, module._buffers[f"{tensor_name}_{name}"]) for name in "uv")
        return TorchSpectralNorm(hook, weight, u, v, hook.dim, hook.eps, hook.n_power_iterations)
    if module._parameters.get(tensor_name) is None:
        raise ValueError(
            f"{name}: the weight is not a parameter of the layer; undo what replaced it first "
            "(torch.nn.utils.prune.remove for a pruned layer), or leave the layer out"
        )
    return None


def _check_dim(dim: int, name: str) -> None:
    if dim not in (0, 1):
        raise ValueError(f"{name}: torch's spectral norm over dimension {dim} cannot be taken over; remove it first")


def check_vectors(norm: TorchSpectralNorm, name: str) -> None:
    """Raise ValueError if u and v do not belong to the weight's shape."""
    found, sizes = (norm.u.numel(), norm.v.numel()), vector_sizes(norm.weight.shape, norm.dim, False)
    if found != tuple(sizes) or norm.u.ndim != 1 or norm.v.ndim != 1:
        raise ValueError(
            f"{name}: u and v of sizes {found} do not fit a weight of shape {tuple(norm.weight.shape)}, which needs "
            f"{tuple(sizes)}; remove torch's spectral norm, and apply again"
        )


def unparametrize(module: nn.Module, tensor_name: str) -> None:
    """Make the weight before normalisation a plain parameter again."""
    # Copies made by deepcopy share the class that parametrize made, whose property of the weight will be deleted.
    kind = type(module)
    module.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
    parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=False)


def strip(module: nn.Module, norm: TorchSpectralNorm, tensor_name: str) -> None:
    """Take torch's spectral norm off a layer: the weight before normalisation becomes its plain parameter."""
    if norm.hook is None:
        unparametrize(module, tensor_name)
        return
    for hooks, kind in (
        (module._forward_pre_hooks, SpectralNorm),
        (module._state_dict_hooks, SpectralNormStateDictHook),
        (module._load_state_dict_pre_hooks, SpectralNormLoadStateDictPreHook),
    ):
        for key, hook in list(hooks.items()):
            inner = getattr(hook, "hook", hook)  # torch wraps pre-hooks of state dicts
            if isinstance(inner, kind) and getattr(getattr(inner, "fn", inner), "name", None) == tensor_name:
                del hooks[key]
    delattr(module, tensor_name)
    del (
        module._parameters[f"{tensor_name}_orig"],
        module._buffers[f"{tensor_name}_u"],
        module._buffers[f"{tensor_name}_v"],
    )
    module.register_parameter(tensor_name, norm.weight)
