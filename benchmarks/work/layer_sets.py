"""Sets of layers: those of real models, listed in layer_sets.json, and synthetic ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_FILE = Path(__file__).with_name("layer_sets.json")
_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}


@dataclass(frozen=True)
class Layer:
    """One layer: "conv", "convT", "linear" or "embedding"; the shape of its weight as torch stores it; its groups."""

    kind: str
    shape: tuple[int, ...]
    groups: int = 1

    @property
    def dim(self) -> int:
        """The output dimension of the weight."""
        return int(self.kind == "convT")

    def module(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a torch layer, without bias, whose weight has this shape."""
        a, b, *kernel = self.shape
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.kind == "conv":
            convolution = _CONVOLUTIONS[len(self.shape)]
            return convolution(b * self.groups, a, tuple(kernel), groups=self.groups, bias=False, **at)
        if self.kind == "convT":
            transposed = _TRANSPOSED[len(self.shape)]
            return transposed(a, b * self.groups, tuple(kernel), groups=self.groups, bias=False, **at)
        if self.kind == "linear":
            return nn.Linear(b, a, bias=False, **at)
        if self.kind == "embedding":
            return nn.Embedding(a, b, **at)
        raise ValueError(f"unknown kind of layer {self.kind!r}")


@dataclass(frozen=True)
class LayerSet:
    """Layers whose weights are normalised together."""

    name: str
    about: str
    layers: tuple[Layer, ...]

    @property
    def weights(self) -> int:
        """Number of elements of all weights."""
        return sum(prod(layer.shape) for layer in self.layers)


class Weights(nn.Module):
    """The layers of a set; calling it reads the weight of each once, as a forward pass of the real model does."""

    def __init__(
        self, layer_set: LayerSet, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer.module(device, dtype) for layer in layer_set.layers)

    def forward(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]


def load() -> dict[str, LayerSet]:
    """Return the real models' sets by name."""
    return {
        name: LayerSet(name, entry["about"], tuple(Layer(kind, tuple(s), g) for kind, s, g in entry["layers"]))
        for name, entry in json.loads(_FILE.read_text()).items()
    }


def tiny() -> LayerSet:
    """Return one small layer of each kind: to try out everything else in no time."""
    return LayerSet(
        "tiny",
        "one small layer of each kind",
        (
            Layer("conv", (6, 4, 3, 3)),
            Layer("conv", (8, 2, 5), 4),
            Layer("convT", (8, 4, 4, 4)),
            Layer("linear", (5, 7)),
            Layer("linear", (1, 9)),
            Layer("embedding", (10, 6)),
        ),
    )


GRID = {
    # kind: (numbers of layers, widths)
    "linear": ((1, 5, 20, 100), (4, 64, 256, 1024)),
    "conv": ((1, 5, 20, 100), (4, 32, 128, 512)),
}
GRID_WEIGHTS = 64_000_000
"""Points of the grid with more elements are left out."""


def square(kind: str, layers: int, width: int) -> LayerSet:
    """Return equal layers with `width` input and output channels: "linear", or "conv" with 3 x 3 kernels."""
    layer = Layer(kind, (width, width, 3, 3) if kind == "conv" else (width, width))
    return LayerSet(f"{kind}-{layers}x{width}", f"{layers} {kind} layers of width {width}", (layer,) * layers)


def grid(kind: str) -> list[LayerSet]:
    """Return the synthetic sets of one kind: number of layers times width."""
    numbers, widths = GRID[kind]
    points = [square(kind, n, w) for n in numbers for w in widths]
    return [point for point in points if point.weights <= GRID_WEIGHTS]
