"""Layers that already carry a normalisation: torch's two spectral norms are taken over, others are refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook

from bssn_fast import reference
from bssn_fast.calls.estimation import are_units
from bssn_fast.layout import compute_dtype, vector_sizes
from bssn_fast.modules.parametrization import SpectralNormalization, original_of, parametrizations_of

WEIGHT = "weight"


@dataclass
class TorchSpectralNorm:
    """What is known of a spectral norm of torch that a layer carries."""

    hook: SpectralNorm | None  # torch.nn.utils.spectral_norm, else the parametrization of the same name
    weight: nn.Parameter
    vectors: list[Tensor]  # u and v; none for a weight of one dimension
    dim: int
    eps: float
    n_power_iterations: int
    followed: bool = False  # by other parametrizations, which change what it gives

    def multiplier(self) -> Tensor:
        """Return 1 / sigma, as in evaluation."""
        w = self.weight.detach()
        w = w.to(compute_dtype(w.dtype))
        vectors = tuple([v.detach().to(w.device, w.dtype) for v in self.vectors])
        return reference.multiplier(reference.spectral_norm(w, vectors, self.dim), 1.0)


def find(module: nn.Module, name: str, tensor_name: str = WEIGHT) -> SpectralNormalization | TorchSpectralNorm | None:
    """Return the spectral norm on a weight of the module; raise ValueError if something else sits there."""
    if parametrize.is_parametrized(module, tensor_name):
        parametrizations = parametrizations_of(module, tensor_name)
        found = list(parametrizations)
        old = found[0]
        if isinstance(old, SpectralNormalization):
            return old
        if type(old) is _SpectralNorm:  # a subclass may compute something else
            weight = cast(nn.Parameter, original_of(parametrizations))
            vectors = [old._u, old._v] if weight.ndim > 1 else []
            # Some versions of torch keep the dimension as a negative number where it was given as one.
            n_power_iterations = getattr(old, "n_power_iterations", 1)  # not there for one dimension
            settings = old.dim % weight.ndim, old.eps, n_power_iterations
            return TorchSpectralNorm(None, weight, vectors, *settings, followed=len(found) > 1)
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
        weight = cast(nn.Parameter, module._parameters[f"{tensor_name}_orig"])
        vectors = [cast(Tensor, module._buffers[f"{tensor_name}_{name}"]) for name in "uv"] if weight.ndim > 1 else []
        return TorchSpectralNorm(hook, weight, vectors, hook.dim % weight.ndim, hook.eps, hook.n_power_iterations)
    if module._parameters.get(tensor_name) is None:
        raise ValueError(
            f"{name}: the weight is not a parameter of the layer; undo what replaced it first "
            "(torch.nn.utils.prune.remove for a pruned layer), or leave the layer out"
        )
    return None


def carried(module: nn.Module) -> dict[str, bool]:
    """Return the names of a module's tensors that carry a spectral norm first of all, and whether it is torch's."""
    found = {h.name: True for h in module._forward_pre_hooks.values() if type(h) is SpectralNorm}
    if parametrize.is_parametrized(module):
        for name in cast(Any, module).parametrizations:
            first = parametrizations_of(module, name)[0]
            if isinstance(first, SpectralNormalization) or type(first) is _SpectralNorm:
                found[name] = type(first) is _SpectralNorm
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
