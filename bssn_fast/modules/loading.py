"""Loading of checkpoints: those of torch's spectral norms and of plain models become those of normalised ones."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from bssn_fast import reference
from bssn_fast.calls.arguments import check_module
from bssn_fast.calls.estimation import are_units, belong, estimate_vectors
from bssn_fast.calls.sharded import estimate_sharded
from bssn_fast.distributed.sharded import is_sharded
from bssn_fast.laws import first_gain
from bssn_fast.layout import compute_dtype
from bssn_fast.modules.convert import carried
from bssn_fast.modules.lists import original_of, parametrizations_of
from bssn_fast.modules.parametrization import SpectralNormalization

_WRAPPERS = {"module", "_orig_mod"}


class Incompatible(NamedTuple):
    """Keys that did not match, as `torch.nn.Module.load_state_dict` returns them."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> Incompatible:
    """Load a checkpoint that was saved from a wrapped model, or load into a wrapped model.

    As `model.load_state_dict(state_dict, strict, assign)`, but the prefixes `module.` (DataParallel,
    DistributedDataParallel, AveragedModel) and `_orig_mod.` (torch.compile) need not be the same on both sides. The
    model need not be normalised.

    Normalised layers load weights from three layouts, with this function and without it: torch's parametrization
    (`parametrizations.weight.original`, `.0._u`, `.0._v`), in which they are saved, torch's hook (`weight_orig`,
    `weight_u`, `weight_v`) and plain weights (`weight`). Missing vectors, and vectors that are no unit vectors because
    they were averaged, are computed from the weights; those of a direction that the layer does not have are left out.

    Raises RuntimeError, as torch does, where keys or shapes do not match, and, with `strict=False` too, if the
    checkpoint is of a normalised model and `apply` has not been called on this one.
    """
    check_module(model, "load_state_dict")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"bssn_fast.load_state_dict needs a state_dict, not {type(state_dict).__name__}; torch.load it")
    inner = model
    while (child := _wrapped(inner)) is not None:
        inner = child
    state_dict = _without_wrappers(inner, state_dict)
    _refuse_normalized(inner, state_dict)
    found = inner.load_state_dict(state_dict, strict=strict, assign=assign)
    return Incompatible(found.missing_keys, found.unexpected_keys)


def _refuse_normalized(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Raise RuntimeError if the checkpoint has a spectral norm's vectors where the model has no spectral norm."""
    modules = dict(model.named_modules())
    for key in state_dict:
        of_hook = _OF_HOOK.fullmatch(key)
        found = of_hook or _OF_PARAMETRIZATION.fullmatch(key)
        path, name = found.groups() if found is not None else ("", "")
        module = modules.get(path.removesuffix("."))
        if not name or module is None or name in carried(module) or f"{path}{name}_mask" in state_dict:
            continue  # pruning calls the weight `weight_orig` too
        plain = name in module._parameters and not (of_hook and f"{name}_orig" in module._parameters)
        if plain or (not of_hook and parametrize.is_parametrized(module, name)):
            raise RuntimeError(
                f"{path}{name} is normalised in the checkpoint and not in the model: call bssn_fast.apply(model, "
                "...) first, with the variant and settings of the model that was saved"
            )


_OF_PARAMETRIZATION = re.compile(r"((?:.+\.)?)parametrizations\.([^.]+)\.\d+\._u")
_OF_HOOK = re.compile(r"((?:.+\.)?)([^.]+)_orig")


def _wrapped(model: nn.Module) -> nn.Module | None:
    """Return the model inside a wrapper of torch's; None if this is no wrapper."""
    children = dict(model.named_children())
    if len(children) == 1 and type(model).__module__.startswith("torch.") and not model._buffers:
        for name in _WRAPPERS & children.keys():
            return children[name]
    return None


def _without_wrappers(model: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the checkpoint under the names that the unwrapped model knows."""
    children = dict(model.named_children())
    metadata = getattr(state_dict, "_metadata", None)
    names: dict[str, str] = {key: key for key in state_dict}
    if len(names) > 1 and "n_averaged" in names and "n_averaged" not in dict(model.named_buffers(recurse=False)):
        del names["n_averaged"]  # AveragedModel's own
    while (wrapper := _common_wrapper(names.values(), children)) is not None:
        names = {key: name.removeprefix(f"{wrapper}.") for key, name in names.items()}
    # Parts of a model may have been compiled.
    names = {key: name if "_orig_mod" in children else _drop(name, "_orig_mod") for key, name in names.items()}
    found: Any = OrderedDict((name, state_dict[key]) for key, name in names.items())
    if metadata is not None:  # versions of modules: those of a wrapper's prefix are the model's
        paths = {_module_path(name): _module_path(key) for key, name in names.items()}
        versions = {path: metadata[old] for path, old in paths.items() if old in metadata}
        found._metadata = OrderedDict(versions)
    return cast(Mapping[str, Any], found)


def _common_wrapper(names: Iterable[str], children: Mapping[str, nn.Module]) -> str | None:
    """Return the wrapper that all names begin with, unless it is a part of the model that has this name."""
    names = list(names)
    first = {name.split(".", 1)[0] for name in names}
    if len(first) == 1:
        (component,) = first
        inside = all(name.startswith(f"{component}.") for name in names)  # or it is itself a tensor's name
        if inside and component in _WRAPPERS and component not in children:
            return component
    return None


def _drop(name: str, component: str) -> str:
    return ".".join(part for part in name.split(".") if part != component)


def _module_path(key: str) -> str:
    return key.rpartition(".")[0]


def watch_loading(module: nn.Module) -> None:
    """Let a normalised layer's `load_state_dict` take all layouts; once is enough for several weights."""
    if not _hooks(module):
        module.register_load_state_dict_pre_hook(_translate)


def stop_watching(module: nn.Module) -> None:
    """Undo `watch_loading`."""
    for key in _hooks(module):
        del module._load_state_dict_pre_hooks[key]


def _hooks(module: nn.Module) -> list[int]:
    return [key for key, hook in module._load_state_dict_pre_hooks.items() if getattr(hook, "hook", None) is _translate]


def _translate(
    module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, metadata: dict[str, Any], *_: object
) -> None:
    """Before a layer is loaded: bring what the checkpoint has of it into the layout of torch's parametrization."""
    for tensor_name in getattr(module, "parametrizations", {}):
        layer = parametrizations_of(module, tensor_name)
        norm = layer[0]
        if isinstance(norm, SpectralNormalization) and "original" in layer._parameters:  # else it is pruned
            weight = original_of(layer)
            _refuse_untying(norm, f"{prefix}{tensor_name}", metadata)
            target = f"{prefix}parametrizations.{tensor_name}."
            own = f"{tensor_name}_orig" in [*module._parameters, *cast(Any, module).parametrizations]
            plain = _rename(state_dict, f"{prefix}{tensor_name}", target, hooks=not own)
            # Of two directions where the layer has one; torch's hook has vectors for a weight of one dimension too.
            for name in {"_u", "_v", "_u_in", "_v_in"}.difference(norm.vector_names):
                state_dict.pop(f"{target}0.{name}", None)
            _refuse_other_blocks(state_dict, target, norm, weight)
            _complete(state_dict, target, norm, weight)
            _complete_gain(state_dict, target, norm, weight, plain)


def _refuse_untying(norm: SpectralNormalization, name: str, metadata: dict[str, Any]) -> None:
    """Raise RuntimeError where layers that share a weight, and with it u and v, would get a Parameter each."""
    # torch leaves the entry behind, in the dict that the checkpoint holds: without `assign` it would be found again.
    if norm.layers > 1 and metadata.pop("assign_to_params_buffers", False):
        raise RuntimeError(
            f"{name} is shared with another layer, and load_state_dict(assign=True) would give each layer a Parameter "
            "of its own, which cannot have the same u and v. Load with assign=False, or call bssn_fast.remove before "
            "loading and bssn_fast.apply after"
        )


def _rename(state_dict: MutableMapping[str, Any], plain: str, target: str, *, hooks: bool) -> bool:
    """Bring a weight, and u and v, under the names of torch's parametrization; return whether it was a plain one.

    hooks: look for the names of torch's hook; `weight_orig` is no other parameter of the layer.

    Raises RuntimeError for a weight in two of the layouts: the one that is not taken would be lost without a word.
    """
    if f"{target}original" in state_dict:
        for other in (plain, f"{plain}_orig")[: 1 + hooks]:
            if other in state_dict:
                raise RuntimeError(
                    f"{target}original and {other} are both in the checkpoint, and only one can be the weight: delete "
                    "the other. set_model_state_dict(full_state_dict=True) adds the first: load the checkpoint of a "
                    "plain model by model.load_state_dict, before fully_shard"
                )
        return False
    if hooks and f"{plain}_orig" in state_dict:
        # The first versions of the hook saved the normalised weight too.
        state_dict.pop(plain, None)
        for old, new in (("_orig", "original"), ("_u", "0._u"), ("_v", "0._v")):
            if plain + old in state_dict:
                state_dict[target + new] = state_dict.pop(plain + old)
    elif plain in state_dict:
        state_dict[f"{target}original"] = state_dict.pop(plain)
        return True
    return False


def _of_the_weight_that_stays(
    fitting: dict[str, Tensor], keys: list[str], norm: SpectralNormalization, weight: Tensor
) -> dict[str, Tensor]:
    """Return a checkpoint's vectors if they belong to a weight that it does not change, else the layer's own."""
    if not fitting or weight.is_meta:
        return fitting
    own = norm.vectors(weight)
    found = [fitting.get(key, v).to(v) for key, v in zip(keys, own, strict=True)]
    if all(are_units(found)) and belong(weight, found, norm.dim, norm.settings.eps, stack=norm.settings.stack):
        return fitting
    return {key: v.clone() for key, v in zip(keys, own, strict=True) if key in fitting}


def _refuse_other_blocks(
    state_dict: MutableMapping[str, Any], target: str, norm: SpectralNormalization, weight: Tensor
) -> None:
    """Raise RuntimeError for vectors of other blocks than the layer's, before anything is loaded."""
    for name, shape in zip(
        norm.vector_names, norm.settings.stack.vector_shapes(weight.shape, norm.dim, norm.two_sided), strict=True
    ):
        vector = state_dict.get(f"{target}0.{name}")
        found = shape if vector is None else tuple(vector.shape)
        if len(found) in (1, 2) and found[:-1] != shape[:-1]:
            n = found[0] if len(found) == 2 else 1
            raise RuntimeError(
                f"{norm.name}: the checkpoint's vectors are those of {n} blocks, and the layer has "
                f"{norm.settings.stack.n}. Call bssn_fast.apply with the same blocks before loading, or delete the "
                f"vectors {target}0.{norm.vector_names[0]} and so on, and the gain, from the checkpoint"
            )


def _complete(state_dict: MutableMapping[str, Any], target: str, norm: SpectralNormalization, weight: Tensor) -> None:
    """Estimate the vectors of the directions that the checkpoint has no, or no good, vectors for."""
    loaded = state_dict.get(f"{target}original")
    keys = [f"{target}0.{name}" for name in norm.vector_names]
    given = [state_dict.get(key) for key in keys]
    shapes = norm.settings.stack.vector_shapes(weight.shape, norm.dim, norm.two_sided)
    if is_sharded(weight) and not (isinstance(loaded, Tensor) and is_sharded(loaded)):
        return  # nothing can be said of a part alone, nor can torch load it
    if not isinstance(loaded, Tensor) or loaded.shape != weight.shape:
        fitting = {key: v for key, v, s in zip(keys, given, shapes, strict=True) if v is not None and v.shape == s}
        state_dict.update(_of_the_weight_that_stays(fitting, keys, norm, weight))
        return  # torch says what is wrong
    if any(v is not None and tuple(v.shape) != shape for v, shape in zip(given, shapes, strict=True)):
        return
    if loaded.is_meta:
        state_dict.update(
            (key, loaded.new_empty(s)) for key, v, s in zip(keys, given, shapes, strict=True) if v is None
        )
        return
    for j, vector in enumerate(given):
        if vector is not None and compute_dtype(vector.dtype) != vector.dtype and are_units([vector])[0]:
            given[j] = state_dict[keys[j]] = nn.functional.normalize(vector.float(), dim=-1)
    directions = [slice(j, j + 2) for j in range(0, len(keys), 2)]
    missing = [d for d in directions if not all(v is not None and are_units([v])[0] for v in given[d])]
    if not missing:
        return
    device = loaded.device if weight.is_meta else weight.device
    loaded = loaded.to(device, weight.dtype)
    found = estimate_sharded(norm, loaded, given) if is_sharded(loaded) else _estimated(norm, loaded, given)
    for direction in missing:
        state_dict.update(zip(keys[direction], found[direction], strict=True))


def _estimated(norm: SpectralNormalization, weight: Tensor, hints: Sequence[Tensor | None]) -> list[Tensor]:
    s, sides = norm.settings, (norm.dim, norm.two_sided)
    return estimate_vectors(weight, *sides, hints=hints, eps=s.eps, backend=s.backend, stack=s.stack)


def _complete_gain(
    state_dict: MutableMapping[str, Any], target: str, norm: SpectralNormalization, weight: Tensor, plain: bool
) -> None:
    """Give a layer that learns its gain the one that leaves the checkpoint's weight as it was in use there.

    That is the weight itself of a plain layer, and W / s_out of one that torch, or `sn`, has normalised.
    """
    loaded, key = state_dict.get(f"{target}original"), f"{target}0.gain"
    if norm.gain is None or key in state_dict or not isinstance(loaded, Tensor) or loaded.shape != weight.shape:
        return
    found = [state_dict.get(f"{target}0.{name}") for name in norm.vector_names]
    stack = norm.settings.stack
    shapes = stack.vector_shapes(weight.shape, norm.dim, norm.two_sided)
    if is_sharded(loaded) or any(v is None or tuple(v.shape) != shape for v, shape in zip(found, shapes, strict=True)):
        return  # torch says what is missing
    if loaded.is_meta:
        state_dict[key] = loaded.new_empty(norm.gain.shape, dtype=norm.gain.dtype)
        return
    device = loaded.device if weight.is_meta else weight.device
    w = loaded.detach().to(device, compute_dtype(weight.dtype))
    vectors = [cast(Tensor, v).detach().to(device, w.dtype) for v in found]
    in_use = None if plain else reference.multiplier(_sigma(norm, w, vectors[:2]), 1.0)
    if not belong(w, vectors, norm.dim, norm.settings.eps, stack=stack):  # evaluation would find others
        vectors = _estimated(norm, w, vectors)
        state_dict.update((f"{target}0.{name}", v) for name, v in zip(norm.vector_names, vectors, strict=True))
    gain = first_gain(_sigma(norm, w, vectors), in_use)
    state_dict[key] = gain.reshape(norm.gain.shape).to(norm.gain.dtype)


def _sigma(norm: SpectralNormalization, weight: Tensor, vectors: list[Tensor]) -> Tensor:
    stack = norm.settings.stack
    return stack.join_numbers([reference.spectral_norm(w, own, norm.dim) for w, own in stack.each(weight, vectors)])
