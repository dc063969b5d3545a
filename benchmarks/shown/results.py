"""Results as files: kept by machine and version, merged when only a part is measured again."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from benchmarks.against.peers import OURS
from benchmarks.timing import machine
from benchmarks.timing.record import Record

FOLDER = Path(__file__).parents[1] / "results"
JSON, CSV = "results.json", "results.csv"


@dataclass
class Results:
    """All records of one machine."""

    machine: dict[str, object]
    records: list[Record] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where these results are kept among the committed ones."""
        return FOLDER / machine.key(self.machine)

    def merge(self, records: Iterable[Record]) -> None:
        """Add records; those of the same case are replaced."""
        records = list(records)
        done = {_case(r) for r in records}
        self.records = [r for r in self.records if _case(r) not in done] + records

    def merge_phase(self, record: Record) -> None:
        """Add a record whose other phases are measured by themselves; one of the same case and phase is replaced."""
        self.records = [r for r in self.records if r.key != record.key] + [record]

    def set_launches(self, counted: Iterable[Record]) -> None:
        """Give all records their numbers of launches that were counted by themselves, whatever the caches' state."""
        counts = {(*_case(r)[:4], r.phase, r.dtype): r.launches for r in counted}
        for r in self.records:
            r.launches = counts.get((*_case(r)[:4], r.phase, r.dtype), r.launches)

    def find(
        self,
        part: str,
        set_name: str,
        variant: str,
        peer: str,
        phase: str,
        caches: str = "hot",
        dtype: str = "float32",
    ) -> Record | None:
        """Return the record of one case, if it has a time."""
        for r in self.records:
            if r.key == (part, set_name, variant, peer, phase, caches, dtype):
                return r if r.median is not None else None
        return None

    def sets(self, part: str, variant: str | None = None) -> list[str]:
        """Return the names of a part's sets."""
        return list(dict.fromkeys(r.set for r in self.records if r.part == part and variant in (None, r.variant)))

    @property
    def kind(self) -> str:
        """The kind of device: cuda or cpu."""
        return "cuda" if "cuda" in self.machine else "cpu"

    def peers(self, part: str) -> list[str]:
        """Return the names of a part's peers."""
        return list(dict.fromkeys(r.peer for r in self.records if r.part == part))

    def ours(self, part: str = "layers") -> list[str]:
        """Return the names of bssn_fast's own entries: one per backend."""
        return [name for name in self.peers(part) if name.startswith(OURS)]

    def speedup(self, part: str, set_name: str, variant: str, phase: str, ours: str, peer: str) -> float | None:
        """Return how many times as fast as a peer we are."""
        a = self.find(part, set_name, variant, peer, phase)
        b = self.find(part, set_name, variant, ours, phase)
        return a.median / b.median if a and b else None

    def save(self, folder: Path) -> None:
        """Write JSON and CSV."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [r.to_dict() for r in self.records]
        lines = ",\n".join(json.dumps(row) for row in rows)
        (folder / JSON).write_text(f'{{"machine": {json.dumps(self.machine, indent=1)},\n"records": [\n{lines}\n]}}\n')
        with (folder / CSV).open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Record)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _case(r: Record) -> tuple[str, ...]:
    """Return what the records of all phases that were measured together share."""
    return r.part, r.set, r.variant, r.peer, r.caches, r.dtype


def load(folder: Path) -> Results:
    """Read what `save` has written."""
    data = json.loads((folder / JSON).read_text())
    return Results(data["machine"], [Record(**row) for row in data["records"]])


def everything(folder: Path = FOLDER) -> list[Results]:
    """Return the results of all machines that have been kept, in the order of their folders' names."""
    return [load(path.parent) for path in sorted(folder.glob(f"*/*/{JSON}"))]
