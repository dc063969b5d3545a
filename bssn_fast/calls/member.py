"""A layer as calls see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from bssn_fast.layout import ONE, Stack


class Measured:
    """Sigma of a layer's last normalisation, `sigma[index]`; None where only computing it again would tell.

    The index is a slice for a weight that holds several matrices.
    """

    __slots__ = ("index", "sigma")

    def __init__(self, sigma: Tensor | None = None, index: int | slice = 0) -> None:
        self.sigma, self.index = sigma, index

    @staticmethod
    def at(first: int, stack: Stack) -> int | slice:
        """Return the index of a weight whose first matrix is the first one."""
        return first if stack == ONE else slice(first, first + stack.n)

    def own(self) -> Tensor | None:
        """Return a copy of the layer's sigma, if it is known."""
        return None if self.sigma is None else self.sigma[self.index].clone()

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of a layer takes its own numbers along
        own = self.own()
        if own is None:
            return Measured, ()
        # Kept, as what is sent to another process must not be gone before that opens its memory.
        self.sigma, self.index = (own, slice(0, len(own))) if own.ndim else (own[None], 0)
        return Measured, (self.sigma, self.index)


def gains_of(members: Sequence[Member]) -> list[Tensor]:
    """Return the gains of those members whose law is one, in their order."""
    gains = [m.gain for m in members]
    return [gain for gain in gains if gain is not None]


class Member(Protocol):
    """A layer as calls see it; `modules.parametrization.SpectralNormalization` is the one there is."""

    name: str
    settings: Any  # laws, stack, eps, n_power_iterations, backend, gradient_groups
    dim: int
    two_sided: bool
    autocast: bool
    training: bool
    preceded: bool  # the weight is computed by other parametrizations
    measured: Measured
    seen: Any  # plan.Seen of the last evaluation, None before the first
    vector_names: tuple[str, ...]
    placements: tuple[str, ...]  # of the weight before FSDP shards it; none of a plain tensor
    _buffers: dict[str, Tensor | None]

    @property
    def gain(self) -> Tensor | None: ...  # [1], or [count] of several matrices, where that is its law

    def vectors(self, weight: Tensor) -> list[Tensor]: ...

    def chosen_by_hand(self, weight: Tensor) -> bool | None: ...
