"""What to watch while a normalised model trains: gradients, sigma, and variances against three initialisations."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from math import sqrt
from os import PathLike
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from bssn_fast.calls.arguments import check_module
from bssn_fast.distributed.sharded import whole_of
from bssn_fast.layout import ONE, Stack, channels
from bssn_fast.modules.convert import WEIGHT
from bssn_fast.modules.parametrization import SpectralNormalization
from bssn_fast.modules.places import LAYER_TYPES, Place, normalized_places, refuse_others, weight_of


class Initial(NamedTuple):
    """The variances that three initialisations give a weight."""

    lecun: float
    """1 / fan_in"""
    xavier: float
    """2 / (fan_in + fan_out)"""
    kaiming: float
    """gain^2 / fan_in"""


class Measured(NamedTuple):
    """One layer at one moment."""

    gradient: float | None
    """Euclidean norm of the gradient of the parameter behind the weight; None without a gradient."""
    sigma: float | None
    """What the weight was last divided by; None for a layer that is not normalised.

    After weights were changed without their vectors, it is right again at the next evaluation, which computes vectors.
    """
    variance: float
    """Variance of the elements of the weight that the layer uses, normalised and scaled."""


class Writer(Protocol):
    """What is used of TensorBoard's SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


def initial_variances(shape: tuple[int, ...], dim: int = 0, gain: float = sqrt(2)) -> Initial:
    """Return the variances of LeCun's, Xavier's and Kaiming's initialisation for a weight.

    With a weight of c_out output channels, c_in input channels (of one group) and k kernel positions, fan_in is c_in k
    and fan_out is c_out k. For a transposed convolution torch's own `init` functions exchange the two.

    Args:
        shape: of the weight.
        dim: its output dimension: 0, or 1 for a transposed convolution.
        gain: of Kaiming's, sqrt(2) for ReLU.
    """
    c_out, c_in, k = channels(shape, dim)
    return Initial(1 / (c_in * k), 2 / ((c_in + c_out) * k), gain**2 / (c_in * k))


@torch.no_grad()
def measure(model: nn.Module) -> dict[str, Measured]:
    """Return the gradient norm, sigma and variance of all weights that are normalised or could be.

    The names are those of `bssn_fast.sigma`; blocks of a weight are `name[0]`, `name[1]` and so on. Nothing is
    normalised and no vector changes: the variance is that of the weight as it is now, times what its law makes of
    `bssn_fast.sigma`. Call it between the backward pass and the optimizer's step, when both belong to the same weight.
    Where weights are sharded, all ranks must call it.

    Raises ValueError if the model has no such weight, or a layer whose weight is parametrized by something else.
    """
    check_module(model, "diagnostics")
    weights = _weights(model)
    nothing = torch.zeros((), dtype=torch.float64, device="cpu")
    values = []
    shown: list[tuple[str, bool, bool]] = []  # names, whether there is a gradient, whether the weight is normalised
    for name, (weight, norm, _) in weights.items():
        stack = ONE if norm is None else norm.settings.stack
        sigma = torch.ones_like(nothing) if norm is None else norm.sigma_of(weight).double()
        factor = torch.ones_like(sigma) if norm is None else norm.multiplier_of(sigma)
        grads = [None] * stack.n if weight.grad is None else _parts(weight.grad, stack)
        each = zip(_parts(weight, stack), grads, sigma.reshape(-1), factor.reshape(-1), strict=True)
        for j, (part, grad, its_sigma, its_factor) in enumerate(each):
            values.append(nothing.to(weight.device) if grad is None else _exact(grad).norm())
            values += [its_sigma, _exact(part).var(correction=0) * its_factor.square()]
            shown.append((f"{name}{stack.suffix(j)}", grad is not None, norm is not None))
    first = values[0].device
    numbers = torch.stack([whole_of(value).to(first) for value in values]).view(-1, 3).tolist()  # waits for a GPU once
    return {
        name: Measured(g if has_gradient else None, s if normalized else None, v)
        for (name, has_gradient, normalized), (g, s, v) in zip(shown, numbers, strict=True)
    }


def _parts(tensor: Tensor, stack: Stack) -> Sequence[Tensor]:
    """Return the matrices of a weight or its gradient; where several are sharded, all ranks gather them."""
    return stack.parts(tensor if stack == ONE else whole_of(tensor))


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _weights(model: nn.Module) -> dict[str, tuple[Tensor, SpectralNormalization | None, int]]:
    """Return by name the parameter behind each weight, its normalisation if it has one, and its output dimension."""
    found: dict[str, tuple[Tensor, SpectralNormalization | None, int]] = {}
    norms: dict[str, tuple[Place, SpectralNormalization | None]] = {}
    norms.update({place.name: (place, norm) for place, norm in normalized_places(model)})
    for name, module in model.named_modules():
        if isinstance(module, LAYER_TYPES) and name not in norms:
            if module._parameters.get(WEIGHT) is None:
                raise ValueError(
                    f"{name or type(module).__name__}: the weight is computed by something else than bssn_fast; "
                    "remove that first"
                )
            norms[name] = Place(name, module), None
    for name, (place, norm) in norms.items():
        if norm is not None:
            refuse_others(place)
        weight, dim = weight_of(place, norm)
        found[name] = weight, norm, dim
    if not found:
        raise ValueError(f"{type(model).__name__} has no convolution, linear or embedding layer")
    return found


class History:
    """Collects what `measure` returns during a training, for TensorBoard and for a plot.

    Examples:
        >>> history = bssn_fast.diagnostics.History()
        >>> history.record(discriminator, step)  # after backward, now and then
        >>> history.plot("discriminator.png")
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.layers: dict[str, list[Measured]] = {}
        self.initial: dict[str, Initial] = {}

    def record(self, model: nn.Module, step: int, writer: Writer | None = None) -> dict[str, Measured]:
        """Measure the model's layers and keep the result; with a `writer`, add it to TensorBoard too.

        Raises ValueError as `measure` does, and if the layers are others than before.
        """
        measured = measure(model)
        if not self.steps:
            for name, (weight, norm, dim) in _weights(model).items():
                stack = ONE if norm is None else norm.settings.stack
                for j in range(stack.n):
                    self.initial[f"{name}{stack.suffix(j)}"] = initial_variances(stack.shape(weight.shape), dim)
                    self.layers[f"{name}{stack.suffix(j)}"] = []
        if measured.keys() != self.layers.keys():
            raise ValueError("the model has other layers than before; use a new History for it")
        self.steps.append(step)
        for name, values in measured.items():
            self.layers[name].append(values)
        if writer is not None:
            write(writer, measured, step)
        return measured

    def plot(self, path: str | PathLike[str]) -> None:
        """Write a picture: gradient norms, sigma, and variances with those of the initialisations as short marks.

        Raises ImportError without matplotlib.
        """
        try:
            Figure = importlib.import_module("matplotlib.figure").Figure
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install matplotlib") from error
        figure = cast(Any, Figure(figsize=(15, 4), layout="constrained"))
        for axes, quantity, title in zip(
            figure.subplots(1, 3),
            Measured._fields,
            ("norm of the weight's gradient", "sigma", "variance of the weight used"),
            strict=True,
        ):
            for j, (name, values) in enumerate(self.layers.items()):
                points = [(s, y) for s, v in zip(self.steps, values, strict=True) if (y := getattr(v, quantity))]
                axes.plot(*zip(*points, strict=True), f"C{j}", label=name) if points else None
                if quantity == "variance":
                    for mark, (initialisation, value) in zip("<x>", self.initial[name]._asdict().items(), strict=True):
                        label = initialisation if j == 0 else None
                        axes.plot(self.steps[-1], value, mark, color=f"C{j}", label=label, clip_on=False)
            axes.set(title=title, xlabel="step", yscale="log")
            axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize="small")
        figure.savefig(path, dpi=100)


def write(writer: Writer, measured: dict[str, Measured], step: int) -> None:
    """Add what `measure` returned to TensorBoard, as gradient/NAME, sigma/NAME and variance/NAME.

    writer: a `torch.utils.tensorboard.SummaryWriter`, or whatever has its `add_scalar`.
    """
    for name, values in measured.items():
        for quantity, value in values._asdict().items():
            if value is not None:
                writer.add_scalar(f"{quantity}/{name or 'model'}", value, step)
