"""Torch's list of a weight's parametrizations, and the parameters that it makes the weight of."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList


def parametrizations_of(module: nn.Module, tensor_name: str) -> ParametrizationList:
    """Return what torch's parametrize keeps for a parametrized tensor of a module."""
    return cast(ParametrizationList, cast(Any, module).parametrizations[tensor_name])


def original_of(layer: ParametrizationList) -> Tensor:
    """Return the weight before normalisation; quicker than the attribute `original`.

    Raises ValueError for a weight that is no parameter of the list.
    """
    weight = layer._parameters.get("original")
    if weight is None:
        name = getattr(layer[0], "name", type(layer[0]).__name__)
        raise ValueError(
            f"{name}: the weight before normalisation is no parameter any more; call "
            "torch.nn.utils.prune.remove(layer.parametrizations.weight, 'original') if the layer was pruned"
        )
    return weight


def weight_before(layer: ParametrizationList, position: int) -> Tensor:
    """Return what reaches the parametrization at this position in evaluation, as a tensor of its own without a graph.

    It requires a gradient if a parameter of those before does. They change nothing: a norm among them does not iterate.
    """
    if position == 0:
        return original_of(layer)
    first, *others = before = list(layer)[:position]
    originals = ["original"] if layer.is_tensor else [f"original{j}" for j in range(layer.ntensors)]
    modes = [(module, module.training) for parametrization in before for module in parametrization.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            weight: Tensor = first(*[getattr(layer, name) for name in originals])
            for parametrization in others:
                weight = parametrization(weight)
    finally:
        for module, mode in modes:
            module.training = mode
    sources = [*layer.parameters(recurse=False), *(p for module in before for p in module.parameters())]
    wanted = any(p.requires_grad for p in sources) and (weight.is_floating_point() or weight.is_complex())
    return weight.detach().requires_grad_(wanted)
