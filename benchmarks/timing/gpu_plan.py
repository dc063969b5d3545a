"""What is to be measured on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.against.peers import COMPILED, OURS
from benchmarks.timing.record import Record
from benchmarks.work.layer_sets import square
from benchmarks.work.networks import DISCRIMINATORS
from benchmarks.work.training_step import GRAPH

SETS = ("sngan_d32", "bsn_cnn_d32", "bsn_resnet_d128", "biggan_d128", "dcgan_g32")
OF_SOME_SETS = {f"{OURS} triton registers": SETS[:2]}
"""Peers that some sets alone are for: elsewhere they do what others do."""
VARIANTS = ("bssn", "sn")
DTYPES = ("float32", "bfloat16")
CACHES = ("hot", "cold")
MANY = (20, 130)
"""Numbers of small layers for the host's time."""


@dataclass(frozen=True)
class Planned:
    """What of each of these sets is to be measured in a variant and dtype: the peer that stands for its unit."""

    what: str
    part: str
    sets: tuple[str, ...]
    peer: str
    variant: str
    dtype: str = "float32"

    def missing(self, records: Iterable[Record]) -> list[str]:
        """Return the sets that no record is of."""
        found = [
            r for r in records if r.median and (r.part, r.variant, r.dtype) == (self.part, self.variant, self.dtype)
        ]
        return [s for s in self.sets if not any(r.set.startswith(s) and self._stands_for(r.peer) for r in found)]

    def _stands_for(self, peer: str) -> bool:
        return peer == self.peer or (self.peer == OURS and peer.startswith(OURS))


def planned() -> Iterator[Planned]:
    """Yield everything."""
    for dtype in DTYPES:
        for variant in VARIANTS:
            yield Planned("every way of launching, and the peers", "layers", SETS, OURS, variant, dtype)
            for peer, sets in OF_SOME_SETS.items():
                yield Planned(peer.removeprefix(f"{OURS} "), "layers", sets, peer, variant, dtype)
    hosts = tuple(square("linear", n, 4).name for n in MANY)
    for variant in VARIANTS:
        yield Planned("host time beside the peers'", "host", hosts, OURS, variant)
        captured = f"{OURS} {GRAPH}"
        yield Planned("training steps, eager and captured", "gan", tuple(DISCRIMINATORS), captured, variant)
        for peer in COMPILED:
            yield Planned(peer, "layers", SETS, peer, variant)


def awaiting(records: Iterable[Record]) -> list[tuple[Planned, list[str]]]:
    """Return what is planned and not among the records, with the sets that are missing."""
    records = list(records)
    found = [(plan, plan.missing(records)) for plan in planned()]
    return [(plan, missing) for plan, missing in found if missing]
