"""The values of a plan's last evaluation, and whether they still hold."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from bssn_fast.calls.contents import contents_of
from bssn_fast.calls.normalizer import Values
from bssn_fast.layout import has_its_memory, is_dense


class Kept:
    """Values, and all that they depend on, to tell whether they still hold."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        vectors: Sequence[Tensor],
        gains: Sequence[Tensor],
        dtype: torch.dtype,
        values: Values,
    ) -> None:
        self.values = values.aliases()
        # As long as the old weights are held here, new ones cannot come to lie at the same address.
        self.weights = [w.detach() for w in weights]
        self.vectors, self.dtype = list(vectors), dtype
        self.gains = [g.detach() for g in gains]
        self.contents = self.latest = contents_of([*weights, *vectors, *gains, *values.normalized], readable=True)

    @staticmethod
    def of(
        weights: Sequence[Tensor],
        vectors: Sequence[Tensor],
        gains: Sequence[Tensor],
        dtype: torch.dtype,
        values: Values,
    ) -> Kept | None:
        """Return the values to keep; None where it could not be told later whether they still hold."""
        if not all(map(is_dense, (*weights, *gains))):
            return None
        kept = Kept(weights, vectors, gains, dtype, values)
        return None if kept.contents is None else kept

    def _same_tensors(self, weights: Sequence[Tensor], vectors: Sequence[Tensor], gains: Sequence[Tensor]) -> bool:
        return (
            all(map(is_, vectors, self.vectors))
            and [x.data_ptr() for x in (*weights, *gains)] == [x.data_ptr() for x in (*self.weights, *self.gains)]
            and all(map(has_its_memory, self.values.normalized[-1:]))  # the last in the buffer that all share
        )

    def current(
        self, weights: Sequence[Tensor], vectors: Sequence[Tensor], gains: Sequence[Tensor], dtype: torch.dtype
    ) -> bool:
        """Whether weights, vectors, gains and results are what they were, every element of them.

        Results too: whoever got them may have written into them.
        """
        if not self._same_tensors(weights, vectors, gains):
            self.latest = None
            return False
        self.latest = contents_of([*weights, *vectors, *gains, *self.values.normalized], readable=True)
        return self.latest == self.contents and self.dtype == dtype

    def of_weights(self) -> list[bytes]:
        """Return the contents of each weight."""
        assert self.contents is not None, "made by `of`"
        return [self.contents[8 * j : 8 * j + 8] for j in range(len(self.weights))]

    def changes(self, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[bool, bool]:
        """Whether weights, and whether vectors, have changed, after `current` has looked."""
        n, m = 8 * len(weights), 8 * len(vectors)
        before, now = self.contents, self.latest or contents_of([*weights, *vectors])
        assert before is not None, "made by `of`"
        return now is None or now[:n] != before[:n], now is None or now[n : n + m] != before[n : n + m]
