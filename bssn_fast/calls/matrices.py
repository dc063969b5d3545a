"""Spectral norms of matrices again and again, outside of autograd: measured only, or changed in place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from bssn_fast import ops
from bssn_fast.distributed.sharded import refuse_sharded
from bssn_fast.laws import Law, Laws
from bssn_fast.layout import Batch, has_plain_memory, is_dense


class Matrices:
    """Weights of one dtype and device, each unfolded one way or, with four vectors, both ways.

    vectors: of each weight (u, v) or (u_out, v_out, u_in, v_in), contiguous, in the compute dtype; iterated in place.
    Keeps what it works in, so that a second run allocates nothing but what a backend does.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        dims: Sequence[int],
        vectors: Sequence[Sequence[Tensor]],
        laws: Sequence[Law],
        *,
        eps: float,
        backend: str = "",
    ) -> None:
        self.weights, self._vectors = list(weights), [v for group in vectors for v in group]
        self._batch = Batch.of(self.weights, list(dims), [len(group) == 4 for group in vectors])
        self._kind = self.weights[0].dtype, self.weights[0].device
        self._laws, self._eps, self._backend = Laws.of(laws), eps, backend
        like = self._vectors[0]
        self._snapshot, self.sigma = like.new_empty(self._batch.snapshot_size), like.new_empty(len(self.weights))

    def check(self) -> None:
        """Raise RuntimeError for weights that are no longer what they were, but for their values."""
        if (
            not all(map(has_plain_memory, self.weights))
            or not self._batch.fits(self.weights)
            or any((w.dtype, w.device) != self._kind for w in self.weights)
        ):
            raise RuntimeError(
                "bssn_fast: a weight was given another shape, precision, device, memory format or memory; begin anew"
            )

    @torch.no_grad()
    def run(self, n_power_iterations: int, *, change: bool) -> None:
        """Iterate, set `sigma` and, if wanted, multiply the weights as their laws have it."""
        self.check()
        outputs = self.weights if change else []
        ops.normalize(
            self._batch,
            self.weights,
            self._vectors,
            self._laws,
            self._eps,
            n_power_iterations,
            outputs,
            self._snapshot,
            self.sigma,
            self._backend,
        )
        torch.autograd.graph.increment_version([*self._vectors, *outputs])  # kernels write past torch's versions


def check_in_place(weight: Tensor, name: str) -> None:
    """Raise ValueError, or TypeError for a DTensor, for a weight that kernels cannot change in its place."""
    refuse_sharded(weight, name)
    if not has_plain_memory(weight) or not is_dense(weight):
        raise ValueError(
            f"{name}: a weight is changed in place only where its elements fill one stretch of memory of a CPU or GPU"
        )


def check_apart(weights: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise ValueError for dense weights that share memory: they would be multiplied twice."""
    spans = sorted(
        (w.data_ptr(), w.data_ptr() + w.numel() * w.element_size(), name)
        for w, name in zip(weights, names, strict=True)
    )
    for (_, end, first), (begin, _, second) in pairwise(spans):
        if begin < end:
            raise ValueError(f"{second} shares memory with {first}; give each weight once")
