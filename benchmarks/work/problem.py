"""One thing to compute: the weights, vectors and gradients that all peers are given, and the right answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.work.layer_sets import LayerSet, Weights
from bssn_fast import reference
from bssn_fast.layout import needs_two_sides, vector_sizes

VARIANTS = {
    # name: (both directions, scale)
    "sn": (False, 1.0),
    "bssn": (True, 2**0.5),
}
EPS = 1e-12
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative error, in the Euclidean norm of a tensor, against the reference in float64, by the weights' dtype.

In bfloat16 rounding a result is an error of 0.2 %, and torch's peers, whose vectors and sums are rounded too, have up
to 1 %: a wrong formula shows, a lost digit does not.
"""


class WrongResultError(AssertionError):
    """A peer computes something else: it is not timed."""


@dataclass(frozen=True)
class _Truth:
    """Right results for one layer: normalised weight, updated vectors and gradient of the weight."""

    normalized: Tensor
    vectors: tuple[Tensor, ...]
    gradient: Tensor


class Problem:
    """Normalise all weights of a set in training mode, with one power iteration, and go back.

    weights: the parameters, shared by all peers. vectors: the ones to begin with, for each weight
    (u_out, v_out[, u_in, v_in]), float32. grads: gradients of the normalised weights.
    """

    def __init__(
        self,
        layer_set: LayerSet,
        variant: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.set, self.variant, self.device, self.dtype = layer_set, variant, torch.device(device), dtype
        both, self.scale = VARIANTS[variant]
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.weights: list[nn.Parameter] = [layer.weight for layer in Weights(layer_set, self.device, dtype).layers]
            self.dims = [layer.dim for layer in layer_set.layers]
            self.two_sided = [both and needs_two_sides(layer.shape) for layer in layer_set.layers]
            self.vectors = [
                tuple(_direction(size, w.device) for size in vector_sizes(w.shape, dim, two))
                for w, dim, two in zip(self.weights, self.dims, self.two_sided, strict=True)
            ]
            self.grads = [torch.randn_like(w, requires_grad=False) for w in self.weights]
        self._truth: list[_Truth] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return sum(w.numel() * w.element_size() for w in self.weights)

    def model(self) -> Weights:
        """Return new layers around the shared parameters."""
        model = Weights(self.set, "meta")
        for layer, weight in zip(model.layers, self.weights, strict=True):
            layer.weight = weight
        return model

    def check(
        self, name: str, normalized: list[Tensor], vectors: list[tuple[Tensor, ...]], gradients: list[Tensor]
    ) -> None:
        """Raise WrongResultError if results of one forward and backward from the first vectors are not right."""
        if self._truth is None:
            self._truth = list(self._right_results())
        results = zip(self._truth, normalized, vectors, gradients, strict=True)
        for j, (truth, out, vector, gradient) in enumerate(results):
            pairs = [(out, truth.normalized), (gradient, truth.gradient), *zip(vector, truth.vectors, strict=True)]
            for what, (found, right) in zip(("weight", "gradient", "u", "v", "u_in", "v_in"), pairs, strict=False):
                error = _relative_error(found, right)
                if not error <= TOLERANCES[self.dtype]:  # also for NaN
                    raise WrongResultError(f"{name}: {what} of layer {j} of {self.set.name} is off by {error:.1e}")

    def _right_results(self) -> Iterator[_Truth]:
        # Rounded to the dtypes of a peer's: that error is below the tolerance, and they are kept for all peers.
        for w, vectors, g, dim in zip(self.weights, self.vectors, self.grads, self.dims, strict=True):
            exact = w.detach().double()
            normalized, new, sigma = reference.normalize(
                exact, tuple(v.double() for v in vectors), dim, scale=self.scale, eps=EPS, n_power_iterations=1
            )
            gradient = reference.normalize_backward(g.double(), exact, new, sigma, dim, self.scale)
            yield _Truth(normalized.to(w.dtype), tuple(v.float() for v in new), gradient.to(w.dtype))


def _direction(size: int, device: torch.device) -> Tensor:
    return nn.functional.normalize(torch.randn(size, device=device), dim=0)


def _relative_error(found: Tensor, right: Tensor) -> float:
    difference = torch.linalg.vector_norm(found.detach().float() - right.float())
    return float(difference / torch.linalg.vector_norm(right.float()))
