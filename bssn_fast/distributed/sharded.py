"""Weights that torch.distributed shards: they can be normalised only while they are gathered."""

from __future__ import annotations

import sys

from torch import Tensor, nn


class ShardedWeightError(TypeError):
    """A weight of which this process holds only a part is to be normalised."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import, and without it there are no DTensors
    return module is not None and isinstance(tensor, module.DTensor)


def refuse_sharded(weight: Tensor, name: str) -> None:
    """Raise ShardedWeightError for a weight that is sharded."""
    if is_sharded(weight):
        raise ShardedWeightError(
            f"{name}: the weight is sharded (a DTensor). Call bssn_fast.apply before fully_shard, and use the weight "
            "in the forward of the module given to fully_shard, which gathers it, or after that module's `unshard()`. "
            "Weights sharded in other ways, such as by parallelize_module, cannot be normalised"
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
