"""The two operations, as torch ops: one schema and one fake kernel each, for all layers of a call.

Both write into tensors that the caller has allocated, so that their fake kernels have nothing to do. All weights of
a call share device and dtype. Autograd lies outside, in `calls.normalizer`. A weight that holds several matrices
(`counts`, `indexed`: a `layout.Stack` each, none where all weights are one matrix) is taken apart here: backends see
matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bssn_fast import backends
from bssn_fast.distributed.sharded import refuse_sharded
from bssn_fast.laws import Law, Laws
from bssn_fast.layout import PLAIN_CLASSES, Batch, Stack

SMALLEST_EPS = {torch.float32: 1e-19, torch.float64: 1e-154}
"""Raw vectors are divided by as much as the square of eps, in one multiplication: its inverse must be a number."""


class Checkpoints(NamedTuple):
    """How compiled code, which runs the op and knows no layers, learns of torch.utils.checkpoint around it.

    recall: the vectors that the op, told by a key and by whether it is about to iterate, had in the forward that is
        being repeated; () if it would iterate and that is not known, None if none is repeated.
    note: remember the vectors that it has, if this forward may be repeated.
    """

    recall: Callable[[object, bool], tuple[Tensor, ...] | None]
    note: Callable[[object, Callable[[], tuple[Tensor, ...]]], None]


checkpoints: Checkpoints | None = None
"""The rooms above, which know torch's checkpoints, put it here."""

_library = torch.library.Library("bssn_fast", "DEF")

_library.define(
    "normalize(Tensor[] weights, Tensor(a!)[] vectors, int[] dims, bool[] two_sided, int[] counts, bool[] indexed, "
    "int[] kinds, float[] numbers, Tensor[] gains, float eps, int n_power_iterations, Tensor(b!)[] normalized, "
    "Tensor(c!) snapshot, Tensor(d!) sigma, str backend) -> ()"
)
_library.define(
    "normalize_backward(Tensor[] grads, Tensor[] weights, int[] layers, int[] dims, bool[] two_sided, "
    "int[] counts, bool[] indexed, int[] kinds, float[] numbers, Tensor[] gains, Tensor snapshot, Tensor sigma, "
    "Tensor(a!)[] grad_weights, Tensor(b!)? grad_gains, str backend) -> ()"
)


def _normalize(
    weights: Sequence[Tensor],
    vectors: list[Tensor],
    dims: list[int],
    two_sided: list[bool],
    counts: list[int],
    indexed: list[bool],
    kinds: list[int],
    numbers: list[float],
    gains: list[Tensor],
    eps: float,
    n_power_iterations: int,
    normalized: list[Tensor],
    snapshot: Tensor,
    sigma: Tensor,
    backend: str,
) -> None:
    """Normalise n weights. `backends` documents the arguments.

    A forward that a checkpoint repeats uses the vectors that it had, without iterations, and leaves those of now alone.
    """
    batch, laws = Batch.of(weights, dims, two_sided, list(map(Stack, counts, indexed))), _laws(kinds, numbers, gains)
    key = tuple([tuple(w.shape) for w in weights])
    known = None if checkpoints is None else checkpoints.recall(key, n_power_iterations > 0)
    if known is not None:
        vectors, n_power_iterations = list(known) or vectors, 0
    _forward(batch, weights, vectors, laws, eps, n_power_iterations, normalized, snapshot, sigma, backend)
    if checkpoints is not None and known is None:
        checkpoints.note(key, lambda: tuple([v for own in batch.snapshot_views(snapshot.clone()) for v in own]))


def _normalize_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    layers: list[int],
    dims: list[int],
    two_sided: list[bool],
    counts: list[int],
    indexed: list[bool],
    kinds: list[int],
    numbers: list[float],
    gains: list[Tensor],
    snapshot: Tensor,
    sigma: Tensor,
    grad_weights: list[Tensor],
    grad_gains: Tensor | None,
    backend: str,
) -> None:
    """Gradients of the weights of some of n layers. `backends` documents the arguments."""
    batch = Batch.of(weights, dims, two_sided, list(map(Stack, counts, indexed)))
    outputs = snapshot, sigma, grad_weights, grad_gains
    _backward(batch, grads, weights, layers, _laws(kinds, numbers, gains), *outputs, backend)


def _forward(
    batch: Batch,
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    laws: Laws,
    eps: float,
    n_power_iterations: int,
    normalized: Sequence[Tensor],
    snapshot: Tensor,
    sigma: Tensor,
    backend: str,
) -> None:
    """Run the backend on the matrices that the weights hold."""
    if batch.stacks:
        weights, vectors, normalized = batch.split(weights), batch.split_vectors(vectors), batch.split(normalized)
    eps = max(eps, SMALLEST_EPS[sigma.dtype])
    args = (batch.rows, weights, vectors, laws, eps, n_power_iterations, normalized, snapshot, sigma)
    backends.run("forward", backend, sigma.device, *args)


def _backward(
    batch: Batch,
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    layers: Sequence[int],
    laws: Laws,
    snapshot: Tensor,
    sigma: Tensor,
    grad_weights: Sequence[Tensor],
    grad_gains: Tensor | None,
    backend: str,
) -> None:
    if batch.stacks:
        grads, weights, grad_weights = (
            batch.split(grads, layers),
            batch.split(weights),
            batch.split(grad_weights, layers),
        )
        layers = batch.rows_of(layers)
    args = (batch.rows, grads, weights, layers, laws, snapshot, sigma, grad_weights, grad_gains)
    backends.run("backward", backend, sigma.device, *args)


def _laws(kinds: Sequence[int], numbers: Sequence[float], gains: Sequence[Tensor]) -> Laws:
    return Laws.of(list(map(Law, kinds, numbers))).with_gains(gains)


def _flat(batch: Batch, laws: Laws) -> tuple[object, ...]:
    counts, indexed = [stack.n for stack in batch.stacks], [stack.indexed for stack in batch.stacks]
    geometry = list(batch.dims), list(batch.two_sided), counts, indexed
    return *geometry, list(laws.kinds), list(laws.numbers), list(laws.gains)


for _name, _kernel in (("normalize", _normalize), ("normalize_backward", _normalize_backward)):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bssn_fast::{_name}", lambda *args: None, lib=_library)

normalize_op = torch.ops.bssn_fast.normalize.default
normalize_backward_op = torch.ops.bssn_fast.normalize_backward.default


def _watched(weights: Sequence[Tensor]) -> bool:
    """Whether a compiler, a mode or a subclass of Tensor has to see the operation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or not PLAIN_CLASSES.issuperset(map(type, weights))
    )


def normalize(batch: Batch, weights: Sequence[Tensor], vectors: Sequence[Tensor], laws: Laws, *args: Any) -> None:
    """Run the op `bssn_fast::normalize`, or the backend alone: torch's dispatcher is slow on long lists.

    The arguments are the op's, but for the geometry and the laws, which are one object each.
    """
    if not _watched(weights):
        _forward(batch, weights, vectors, laws, *args)
        return
    for weight in weights:
        refuse_sharded(weight, "bssn_fast")
    with torch.no_grad():  # the weights require gradients, and what the op writes to must not
        normalize_op(weights, vectors, *_flat(batch, laws), *args)


def normalize_backward(
    batch: Batch, grads: Sequence[Tensor], weights: Sequence[Tensor], layers: list[int], laws: Laws, *args: Any
) -> None:
    """The same for `bssn_fast::normalize_backward`."""
    if not _watched(weights):
        _backward(batch, grads, weights, layers, laws, *args)
        return
    normalize_backward_op(grads, weights, layers, *_flat(batch, laws), *args)
