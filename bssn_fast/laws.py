"""What a weight is multiplied by: its law, a function g of its sigma. `reference.multiplier` is the definition.

    constant   g = c / sigma
    at most    g = min(1, c / sigma): the weight stays as it is while sigma <= c
    gain       g = gamma / sigma, gamma being a tensor of one number that may be learned

The first comes with the variants of Lin, Sekar, Fanti (NeurIPS 2021); the second bounds the Lipschitz constants of
residual flows (Behrmann et al., ICML 2019) and of SNGP (Liu et al., NeurIPS 2020); the third is the reparametrization
of Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (ICML 2023).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from bssn_fast.layout import are_all

CONSTANT, AT_MOST, GAIN = range(3)


class Law(NamedTuple):
    """The law of one weight, or of one of the matrices that a weight holds."""

    kind: int = CONSTANT
    number: float = 1.0
    """c; 0 where the tensor of a gain takes its place."""


class Laws:
    """The laws of the matrices of a call, and the gains' tensors [1], in the compute dtype, in the matrices' order.

    `Laws.of` returns the same object for the same laws, without tensors.
    """

    __slots__ = ("_table", "gained", "gains", "kinds", "numbers")

    def __init__(self, kinds: tuple[int, ...], numbers: tuple[float, ...]) -> None:
        self.kinds, self.numbers = kinds, numbers
        self.gained = [j for j, kind in enumerate(kinds) if kind == GAIN]  # the weights that have a tensor
        self.gains: Sequence[Tensor] = ()
        rows = [x for number, kind in zip(numbers, kinds, strict=True) for x in (bits(number), kind)]
        self._table = array("q", rows)

    @staticmethod
    def of(laws: Sequence[Law]) -> Laws:
        """Return the laws of weights."""
        kinds, numbers = zip(*laws, strict=True) if laws else ((), ())
        return _laws(kinds, numbers)

    @property
    def address(self) -> int:
        """Of the table of `struct Law` (csrc/law.h), one row for each weight, while this object lives."""
        return self._table.buffer_info()[0]

    def with_gains(self, gains: Sequence[Tensor]) -> Laws:
        """Return the same laws with these tensors."""
        if not self.gained:
            return self
        found = Laws.__new__(Laws)
        found.kinds, found.numbers, found.gained, found._table = self.kinds, self.numbers, self.gained, self._table
        found.gains = gains
        return found

    def part(self, weights: Sequence[int]) -> Laws:
        """Return the laws of some of the weights, with their tensors."""
        if are_all(weights, len(self.kinds)):
            return self
        found = _laws(tuple([self.kinds[j] for j in weights]), tuple([self.numbers[j] for j in weights]))
        tensors = dict(zip(self.gained, self.gains, strict=False))
        return found.with_gains([tensors[j] for j in weights if j in tensors])

    def each(self) -> list[tuple[float | Tensor, bool]]:
        """Return each weight's scale and whether it is an upper bound, as `reference` takes them."""
        scales: list[float | Tensor] = list(self.numbers)
        for j, gain in zip(self.gained, self.gains, strict=True):
            scales[j] = gain
        return [(scale, kind == AT_MOST) for scale, kind in zip(scales, self.kinds, strict=True)]


_laws = lru_cache(maxsize=256)(Laws)


def bits(number: float) -> int:
    """Return the bits of a double as an integer."""
    found: int = struct.unpack("q", struct.pack("d", number))[0]
    return found


def first_gain(sigma: Tensor, in_use: Tensor | None) -> Tensor:
    """Return the gain with which the weight in use does not change: W times `in_use`, or W."""
    start = (sigma if in_use is None else sigma * in_use.to(sigma.dtype)).real
    return torch.where(torch.isfinite(start) & (start != 0), start, 1)  # a zero weight is zero with any
