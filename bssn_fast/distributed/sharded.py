"""Weights that torch.distributed shards: what they are, and which of them are refused."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn


class ShardedWeightError(TypeError):
    """A weight of which this process holds only a part is to be normalised where that cannot be done."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and without it there are no DTensors
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """Return the elements of a DTensor that this rank holds, without a graph.

    In inference mode, too, where a DTensor's `detach` fails.
    """
    with torch.no_grad():
        return cast(Tensor, cast(Any, tensor).to_local()).detach()


def whole_of(tensor: Tensor) -> Tensor:
    """Return the whole of a DTensor, which all ranks must ask for; another tensor as it is."""
    found: Tensor = cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor
    return found


def like(local: Tensor, weight: Tensor) -> Tensor:
    """Return a DTensor of this rank's elements, sharded as the weight is."""
    w: Any = weight
    found: Tensor = type(w).from_local(
        local, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride()
    )
    return found


def layout_of(tensor: Tensor) -> tuple[object, ...]:
    """Return what says which elements each rank holds; nothing for a tensor that is no DTensor."""
    return (cast(Any, tensor).device_mesh, cast(Any, tensor).placements) if is_sharded(tensor) else ()


def placements_of(tensor: Tensor) -> tuple[str, ...]:
    """Return the placements of a DTensor in words, which copies of a model can have; nothing for another tensor."""
    return tuple(map(str, cast(Any, tensor).placements)) if is_sharded(tensor) else ()


def refuse_sharded(weight: Tensor, name: str) -> None:
    """Raise ShardedWeightError for a weight that is sharded."""
    if is_sharded(weight):
        raise ShardedWeightError(
            f"{name}: the weight is sharded (a DTensor), which this function cannot use: give it the whole "
            "weight (`full_tensor()`), or call bssn_fast.apply on the layer's model"
        )


def refuse_traced(weight: Tensor, name: str) -> None:
    """Raise ShardedWeightError for a sharded weight in what torch.compile traces: messages are sent by eager code."""
    if is_sharded(weight):
        raise ShardedWeightError(
            f"{name}: a sharded weight cannot be normalised in a compiled function. Compile the model itself, "
            "`torch.compile(model)`, or its blocks: the weights are then normalised before compiled code begins"
        )


def refuse_ungathered(weight: Tensor, module: Any, name: str) -> None:
    """Raise ShardedWeightError for a weight that FSDP has not gathered.

    module: its parametrization, with `placements`, those of the weight before it was given to FSDP.
    """
    if is_managed(module) and is_sharded(weight) and placements_of(weight) != module.placements:
        raise ShardedWeightError(
            f"{name}: FSDP has sharded the weight and not gathered it. Use the weight in the forward of the module "
            "given to fully_shard, which gathers it, or after that module's `unshard()`"
        )


def refuse_unfit(weight: Tensor, name: str) -> None:
    """Raise TypeError or ValueError for a sharded weight that cannot be normalised where it lies."""
    w: Any = weight
    if w.ndim == 1 or w.is_complex():
        kind = "a complex one" if w.is_complex() else "one of a single dimension"
        raise TypeError(f"{name}: the weight is sharded and {kind}, which needs whole weights; leave the layer out")
    if w.device_mesh.get_coordinate() is None:
        raise ValueError(f"{name}: this process is not in the mesh of the weight, {w.device_mesh}; do not call it here")
    if any(p.is_partial() for p in w.placements):
        raise ValueError(
            f"{name}: the ranks hold parts of a sum ({w.placements}); make it a weight first: "
            "`redistribute(placements=[Replicate()])`, or Shard"
        )


def refuse_gain(name: str) -> None:
    """Raise TypeError for a learned gain of a weight that is sharded, or a gain that is."""
    raise TypeError(f"{name}: a sharded weight cannot have a learned gain; give it a `scale` or `at_most`")


def refuse_stack(name: str) -> None:
    """Raise TypeError for the blocks of a weight that is sharded."""
    raise TypeError(
        f"{name}: a sharded weight cannot have blocks, as its parts are not theirs. Use fully_shard, which gathers it, "
        "after bssn_fast.apply, or leave the layer out of tensor parallelism"
    )


def refuse_flattened(weight: Tensor | None, module: object) -> None:
    """Raise TypeError for what FullyShardedDataParallel leaves of a weight outside the forward of its own wrapper."""
    if (weight is None or weight.ndim < 2) and is_managed(module):
        raise TypeError(
            "bssn_fast: FullyShardedDataParallel has flattened a weight. Use fully_shard in its place, or wrap only "
            "the module given to bssn_fast.apply, with use_orig_params=True"
        )


def is_managed(module: object) -> bool:
    """Whether FSDP gathers and frees the module's parameters, which torch's versions of them do not show."""
    return "_is_fsdp_managed_module" in vars(module)  # set by fully_shard on all modules inside


def refuse_managed(module: nn.Module, name: str) -> None:
    """Raise TypeError for a layer whose weight FSDP manages: what is written into it would be lost."""
    if is_managed(module):
        raise TypeError(
            f"{name}: FSDP manages the weight. Call bssn_fast.apply before fully_shard; to remove the normalisation, "
            "load the full state dict into a model that is not sharded and call bssn_fast.remove there"
        )


def gathering_modules(model: nn.Module) -> list[nn.Module]:
    """Return the model's submodules that were given to fully_shard, inner ones first."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return [m for m in reversed(list(model.modules())) if isinstance(m, kind) and m is not model]
