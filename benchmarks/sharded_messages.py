"""What normalising sharded weights sends, by calculation: the table in docs/howto/distributed.md.

    python -m benchmarks.sharded_messages

Bytes that each rank sends in a training step with one power iteration, for weights and sums in float32 and rings: an
all-gather or reduce-scatter of S bytes over n ranks sends S (n - 1) / n from each, an all-reduce twice that. That the
messages are these tests/test_sharded.py counts, on two and four ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from benchmarks.work import layer_sets
from benchmarks.work.layer_sets import Layer, LayerSet
from bssn_fast.layout import needs_two_sides, vector_sizes

RANKS = (2, 8, 64, 1024)
BYTES = 4
TRANSFORMER = LayerSet(
    "transformer",
    "24 blocks of width 1024, as in GPT-2 medium, without the embeddings",
    (
        Layer("linear", (3072, 1024)),
        Layer("linear", (1024, 1024)),
        Layer("linear", (4096, 1024)),
        Layer("linear", (1024, 4096)),
    )
    * 24,
)


def iteration_bytes(layers: Iterable[Layer], variant: str) -> tuple[int, int]:
    """Return the sizes of the two messages of a power iteration."""
    halves = [1, 1]  # a number that tells of failures
    for layer in layers:
        both = variant in ("bsn", "bssn") and needs_two_sides(layer.shape, layer.dim)
        sizes = vector_sizes(layer.shape, layer.dim, both)
        halves[0] += sum((sizes[0], *sizes[3:]))
        halves[1] += sum(sizes[1:3])
    return BYTES * halves[0], BYTES * halves[1]


def backward_bytes(layers: Iterable[Layer]) -> int:
    """Return the size of the message of a backward pass over weights that stay sharded."""
    return BYTES * (len(list(layers)) + 1)


def sent(layers: LayerSet, variant: str, ranks: int) -> dict[str, float]:
    """Return the bytes that each rank sends in a step for the weights themselves, and for their normalisation."""
    part = (ranks - 1) / ranks
    weights = BYTES * sum(prod(layer.shape) for layer in layers.layers)
    reduced = sum(iteration_bytes(layers.layers, variant))
    return {
        "FSDP2 itself": 3 * part * weights,  # gathered forward and backward; gradients scattered
        "gather": 0.0,
        "reduce": 2 * part * reduced,
        "tensor parallel, reduce": 2 * part * (reduced + backward_bytes(layers.layers)),
        "tensor parallel, gathering": 2 * part * weights,  # weights forward, gradients backward
    }


def table() -> str:
    """Return the table, in Markdown."""
    rows = []
    for layers, variant in ((layer_sets.load()["biggan_d128"], "bssn"), (TRANSFORMER, "sn")):
        for ranks in RANKS:
            found = sent(layers, variant, ranks)
            if not rows:
                rows += [["model", "ranks", *found], ["---"] * (2 + len(found))]
            rows.append([f"`{layers.name}`, `{variant}`", str(ranks), *(f"{x / 1e6:.3g}" for x in found.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
