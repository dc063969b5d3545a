"""Power iterations on weights of which each rank holds a part: `reference.py` with sums over ranks in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bssn_fast import reference
from bssn_fast.distributed.messages import summed
from bssn_fast.distributed.parts import Part, Side
from bssn_fast.layout import input_dimension, vector_sizes

Vectors = tuple[Tensor, ...]


class Layer(NamedTuple):
    """One weight, and how it is normalised."""

    part: Part
    dim: int
    two_sided: bool
    eps: float

    def sides(self) -> list[Side]:
        """Return the output side and, for two directions, the input side."""
        dims = (self.dim, input_dimension(self.dim)) if self.two_sided else (self.dim,)
        return [Side(self.part, d) for d in dims]

    def sizes(self) -> tuple[int, ...]:
        """Return the lengths of the vectors."""
        return vector_sizes(self.part.shape, self.dim, self.two_sided)


class Layers:
    """Weights whose parts are multiplied and summed together: each sum is one message for each group of ranks.

    The tensors given are this rank's elements of each weight, in the vectors' dtype; the vectors are whole.
    """

    def __init__(self, layers: Sequence[Layer], dtypes: Sequence[torch.dtype]) -> None:
        self._layers = list(layers)
        self._sides = [layer.sides() for layer in layers]
        sizes = [layer.sizes() for layer in layers]
        self._first_halves = [[s[0], *s[3:]] for s in sizes]  # u_out and v_in
        self._second_halves = [[s[1], *s[2:3]] for s in sizes]  # v_out and u_in
        buckets: dict[tuple[int, torch.dtype], list[int]] = {}
        for j, (layer, dtype) in enumerate(zip(layers, dtypes, strict=True)):
            buckets.setdefault((id(layer.part.group), dtype), []).append(j)
        self._buckets = list(buckets.values())  # the layers that share a message

    def iterate(
        self, weights: Sequence[Tensor], vectors: Sequence[Vectors], n: int, failure: Exception | None = None
    ) -> tuple[list[Vectors], list[Tensor]]:
        """Return the vectors after n >= 1 power iterations, and each side's sigma: two messages for an iteration."""
        sigmas: list[Tensor] = []
        vectors = list(vectors)
        for step in range(n):
            vectors, sigmas = self._iterate_once(weights, vectors, failure if step == 0 else None)
        return vectors, sigmas

    def _iterate_once(
        self, weights: Sequence[Tensor], vectors: list[Vectors], failure: Exception | None
    ) -> tuple[list[Vectors], list[Tensor]]:
        """As `reference.power_iteration`: u before v on the output side, v before u on the input side."""

        def first(j: int, outs: Iterator[Tensor]) -> None:
            for side, (u, v), out in zip(self._sides[j], _pairs(vectors[j]), outs, strict=False):
                if side is self._sides[j][0]:
                    side.add_product(out, weights[j], v)
                else:
                    side.add_transposed_product(out, weights[j], u)

        halves = self._sums(self._first_halves, weights, first, failure)
        units, lengths = self._units(halves)

        def second(j: int, outs: Iterator[Tensor]) -> None:
            for side, x, out in zip(self._sides[j], units[j], outs, strict=False):
                if side is self._sides[j][0]:
                    side.add_transposed_product(out, weights[j], x)
                else:
                    side.add_product(out, weights[j], x)

        others = self._sums(self._second_halves, weights, second)
        other_units, other_lengths = self._units(others)
        found: list[Vectors] = []
        sigmas: list[Tensor] = []
        for j, layer in enumerate(self._layers):
            both = torch.stack([lengths[j], other_lengths[j]])
            good = (torch.isfinite(both) & (both > 0)).all(0)  # as `reference.usable`
            # Vectors stay as they were where they lead a weight to 0, or it is not finite.
            rest = torch.where(torch.isfinite(both).all(0), 0.0, torch.nan)
            sigma = both[1] * (both[1] / both[1].clamp_min(layer.eps))  # of a raw vector and its unit
            sigmas.append(torch.where(good, sigma, rest))
            u_out, v_out = units[j][0], other_units[j][0]
            new = (u_out, v_out, *other_units[j][1:], *units[j][1:])  # u_in was the second one on the input side
            keep = good.repeat_interleave(2).unbind()
            found.append(tuple(map(torch.where, keep, new, vectors[j])))
        return found, sigmas

    def _units(self, vectors: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Return x / max(|x|, eps) of each layer's vectors, and their lengths [sides]."""
        lengths = [torch.stack(list(map(reference.norm, xs))) for xs in vectors]
        units = [
            [x / length for x, length in zip(xs, long.clamp_min(layer.eps).unbind(), strict=True)]
            for xs, long, layer in zip(vectors, lengths, self._layers, strict=True)
        ]
        return units, lengths

    def evaluate(
        self,
        weights: Sequence[Tensor],
        vectors: Sequence[Vectors],
        noticed: Sequence[Sequence[bool]] = (),
        failure: Exception | None = None,
    ) -> tuple[list[Tensor], list[list[bool]]]:
        """Return uᵀ W v of each layer's sides: one message.

        noticed: for each layer things that this rank has seen; whether any rank has comes back.
        """

        def fill(j: int, outs: Iterator[Tensor]) -> None:
            for side, (u, v), out in zip(self._sides[j], _pairs(vectors[j]), outs, strict=False):
                out.copy_(side.local_sigma(weights[j], u, v))
            for out, seen in zip(outs, noticed[j] if noticed else (), strict=True):
                out.fill_(float(seen))

        sides = list(map(len, self._sides))
        flags = len(noticed[0]) if noticed else 0
        found = self._sums([[1] * (n + flags) for n in sides], weights, fill, failure)
        sigmas = [torch.cat(x[:n]) for x, n in zip(found, sides, strict=True)]
        sigmas = [torch.where(torch.isfinite(sigma), sigma, torch.nan) for sigma in sigmas]
        if not noticed:
            return sigmas, []
        seen = torch.stack([torch.cat(x[n:]).float() for x, n in zip(found, sides, strict=True)])
        return sigmas, (seen > 0).tolist()  # waits for the device

    def inner(self, weights: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Return ⟨G, W⟩ of each layer, 0 where there is no gradient: one message."""

        def fill(j: int, outs: Iterator[Tensor]) -> None:
            grad, out = grads[j], next(outs)
            if grad is not None and self._layers[j].part.counts:
                out.copy_((grad * weights[j]).sum())

        return [x[0][0] for x in self._sums([[1]] * len(weights), weights, fill)]

    def of_first_rank(
        self,
        weights: Sequence[Tensor],
        values: Sequence[Vectors],
        extra: Sequence[int] = (),
        failure: Exception | None = None,
    ) -> list[Vectors]:
        """Return the first rank's values of tensors [size] for each layer: one message.

        The values are the layer's vectors, and others of the sizes `extra`.
        """

        def fill(j: int, outs: Iterator[Tensor]) -> None:
            if self._layers[j].part.leads:
                for value, out in zip(values[j], outs, strict=True):
                    out.copy_(value)

        return [
            tuple(x) for x in self._sums([[*layer.sizes(), *extra] for layer in self._layers], weights, fill, failure)
        ]

    def _sums(
        self,
        sizes: Sequence[Sequence[int]],
        weights: Sequence[Tensor],
        fill: Callable[[int, Iterator[Tensor]], None],
        failure: Exception | None = None,
    ) -> list[list[Tensor]]:
        """Return sums over ranks of tensors of these sizes for each layer; fill writes one layer's parts."""
        found: list[list[Tensor]] = [[] for _ in weights]
        for bucket in self._buckets:

            def fill_all(parts: list[Tensor], bucket: list[int] = bucket) -> None:
                rest = iter(parts)
                with torch.autocast(parts[0].device.type, enabled=False):  # products keep their operands' precision
                    for j in bucket:
                        fill(j, iter([next(rest) for _ in sizes[j]]))

            flat_sizes = [size for j in bucket for size in sizes[j]]
            group = self._layers[bucket[0]].part.group
            rest = iter(summed(flat_sizes, group, weights[bucket[0]], fill_all, failure))
            for j in bucket:
                found[j] = [next(rest) for _ in sizes[j]]
        return found


def _pairs(vectors: Vectors) -> list[tuple[Tensor, Tensor]]:
    """Return (u, v) of each direction."""
    return [(vectors[j], vectors[j + 1]) for j in range(0, len(vectors), 2)]
