"""What projecting the weights after an optimizer's step asks of torch, beside a plain loop over the matrices.

    python -m benchmarks.projection

Counts operations and the times that a GPU would be waited for, with CPU tensors, as torch dispatches them. An operation
is a launch or more on a GPU: `Projection` is one launch, and one that clears counters.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bssn_fast

ITERATIONS = 10
"""Cold ones, of the loop: published code makes 10 to 26."""


class Counts(NamedTuple):
    operations: int
    waits: int


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def count(call: Callable[[], None]) -> Counts:
    """Return what a call asks of torch."""
    with _Counting() as seen:
        call()
    return Counts(seen.operations, seen.waits)


@torch.no_grad()
def plain_loop(weights: Sequence[Tensor], radius: float) -> None:
    """Project one matrix after another, with cold vectors and a look at each sigma."""
    for w in weights:
        v = w.new_ones(w.shape[1])
        for _ in range(ITERATIONS):
            v = w.mT @ torch.nn.functional.normalize(w @ v, dim=0)
            v = torch.nn.functional.normalize(v, dim=0)
        sigma = (w @ v).norm().item()
        if sigma > 0:
            w.mul_(radius / sigma)


def main() -> None:
    """Print the table of docs/laws.md."""
    for n in (4, 16, 64):
        weights = [torch.randn(16, 16) for _ in range(n)]
        projection = bssn_fast.Projection(weights, radius=1.0)
        ours, plain = count(projection), count(partial(plain_loop, weights, 1.0))
        print(f"| {n} | {ours.operations} | {ours.waits} | {plain.operations:,} | {plain.waits} |")


if __name__ == "__main__":
    main()
