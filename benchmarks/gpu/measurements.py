"""All timings on a GPU, in one process that has it to itself.

    python -m benchmarks.gpu.measurements FOLDER --machine NAME [--compiled]

A unit is what is timed together, with peers that take turns. Units come in the order of what one wants to know first,
behind those that no earlier run has come to, whatever has changed since; each is appended to the outcomes when it is
done. One that has been timed with the same sources is left out, and so is one in which an earlier process of this run
has died: a unit that hangs, or spoils the GPU for this process, ends it. Where only the package has changed, the copy
and ours are timed anew, and the other peers' figures are kept.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.against import peers
from benchmarks.gpu import outcomes
from benchmarks.gpu.outcomes import FILE, OTHERS, TIMING
from benchmarks.gpu.process import FINISHED
from benchmarks.timing import gpu_plan, measure
from benchmarks.timing.gpu_plan import CACHES, VARIANTS
from benchmarks.timing.record import Record
from benchmarks.work import layer_sets, training_step
from benchmarks.work.networks import DISCRIMINATORS
from benchmarks.work.problem import Problem

LONGEST, LONGEST_COMPILED = 90.0, 150.0
"""Seconds after which a unit counts as hung: ten times as long as it takes if all is compiled, see `compile_peers`, and
twice as long as it takes else."""
SECONDS, SECONDS_COMPILED = 1.0, 0.5
"""Of timing, for each state of the caches, or as long as every peer's fewest turns take: compiled peers are few."""


@dataclass(frozen=True)
class Unit:
    """A name, and what makes the records of some of its peers; without peers always all records.

    problem: of layer sets. for_others: whether it is there for peers that are not ours alone.
    """

    name: str
    run: Callable[[Sequence[str]], list[Record]]
    peers: Sequence[str] = ()
    problem: Callable[[], Problem] | None = None
    for_others: bool = False

    def records(self, others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return all records: new ones, but those of other peers that are known."""
        kept = [record for record in others if record["peer"] in self.peers]
        known = {record["peer"] for record in kept}
        left = [name for name in self.peers if name not in known]
        if self.for_others and all(map(outcomes.is_retimed, left)):
            return kept
        return [*(record.to_dict() for record in self.run(left)), *kept]


def units(
    device: str = "cuda", seconds: float = SECONDS, width: int | None = None, batch: int | None = None
) -> list[Unit]:
    """Return all units in their order: float32 first, host time, training steps, bfloat16, numbers of launches.

    width, batch: of the training steps, if not the usual ones.
    """
    first, second = (list(_layers(device, seconds, dtype)) for dtype in gpu_plan.DTYPES)
    training = _training(device, seconds, width, batch)
    return [*first, *_host(device, seconds), *training, *second, *_launches(device)]


def compiled_units(device: str = "cuda", seconds: float = SECONDS_COMPILED) -> list[Unit]:
    """Return the units of torch.compile beside ours: compiling takes most of a minute for each, if not done before."""
    names = [peers.COPY, *peers.COMPILED, *_default(device)]
    return [
        _unit("compiled", sets()[name], variant, names, "float32", device, seconds)
        for name in gpu_plan.SETS
        for variant in VARIANTS[::-1]
    ]


def sets() -> dict[str, layer_sets.LayerSet]:
    """Return the layer sets by name."""
    return layer_sets.load()


def _default(device: str) -> list[str]:
    return [name for name in peers.names(device) if name.startswith(peers.OURS)][:1]


def _names(device: str, chosen: str = "") -> list[str]:
    """Return the peers that are timed, but for those that are not for the set `chosen`."""
    left_out = [*peers.COMPILED, *(peer for peer, its_sets in gpu_plan.OF_SOME_SETS.items() if chosen not in its_sets)]
    return [name for name in peers.names(device) if name not in left_out]


def _layers(device: str, seconds: float, dtype: str) -> Iterator[Unit]:
    for chosen in gpu_plan.SETS:
        for variant in VARIANTS:
            yield _unit("layers", sets()[chosen], variant, _names(device, chosen), dtype, device, seconds)


def _launches(device: str) -> Iterator[Unit]:
    """Yield what counts launches: of a small model, and of many layers, as the others have as many or more."""
    cases = [
        ("layers", sets()[gpu_plan.SETS[0]]),
        *(("host", layer_sets.square("linear", n, 4)) for n in gpu_plan.MANY),
    ]
    for part, chosen in cases:
        for variant in VARIANTS:
            run = partial(measure.launch_counts, part, chosen, variant, device=device)
            yield Unit(f"launches {chosen.name} {variant}", run, _names(device, chosen.name))


def _host(device: str, seconds: float) -> Iterator[Unit]:
    names = _names(device)
    for n in gpu_plan.MANY:
        chosen = layer_sets.square("linear", n, 4)
        for variant in VARIANTS:
            yield _unit("host", chosen, variant, names, "float32", device, seconds)


def _training(device: str, seconds: float, width: int | None, batch: int | None) -> Iterator[Unit]:
    batch = batch or training_step.batch_size(device)
    for kind in DISCRIMINATORS:
        step = partial(measure.gan_steps, kind, device=device, batch=batch, seconds=3 * seconds, width=width)
        yield Unit(f"training step {kind}", lambda names, step=step: step())


def _unit(
    kind: str, chosen: layer_sets.LayerSet, variant: str, names: Sequence[str], dtype: str, device: str, seconds: float
) -> Unit:
    """Return the unit of one layer set; `kind` is "layers", "compiled" or "host"."""
    of_dtype = getattr(torch, dtype)
    run = partial(
        measure.layer_set, "layers" if kind == "compiled" else kind, chosen, variant,
        device=device, dtype=of_dtype, seconds=seconds, caches=("hot",) if kind == "host" else CACHES,
        count_launches=False, empty_cache=False,
    )  # fmt: skip
    name = " ".join([kind, chosen.name, variant, *([dtype] if kind == "layers" else [])])
    return Unit(name, run, names, partial(Problem, chosen, variant, device, of_dtype), kind == "compiled")


def in_order(chosen: Sequence[Unit], timed_before: Collection[str]) -> list[Unit]:
    """Return the units in their order, but first those that no earlier run came to, as none may come to all.

    Those that count launches stay where they are, last: see `measure.launch_counts`.
    """
    return sorted(chosen, key=lambda unit: unit.name in timed_before or unit.name.startswith("launches"))


def without_deadly(unit: Unit, tests: Sequence[str]) -> Unit:
    """Return the unit without those of our ways, but for the usual ones, of which one of these tests is.

    What hangs, or spoils the GPU, would take the figures of all others with it, in each unit anew.
    """
    ways = {name: name.removeprefix(f"{peers.OURS} ").replace(" ", "-") for name in unit.peers if name.count(" ") > 1}
    left = [name for name in unit.peers if name not in ways or not any(ways[name] in test for test in tests)]
    return replace(unit, peers=left)


def run(chosen: Sequence[Unit], folder: Path, machine: str, longest: float) -> int:
    """Run the units that are left, and return the process's exit status."""
    file = folder / FILE
    lines = list(outcomes.read(file))
    tried = {line["name"] for line in outcomes.of_this_run(lines) if line["kind"] in ("begun", "unit")}
    left_out = tried | set(outcomes.measured(lines, machine))
    failed = [name for name in tried if name not in outcomes.measured(lines, machine)]
    others = outcomes.others_measured(lines, machine)
    hashes = {"sources": outcomes.sources(machine, *TIMING), "sources_of_others": outcomes.hash_of(machine, *OTHERS)}
    deadly = outcomes.deadly(lines, machine)
    for one in in_order(chosen, outcomes.timed_before(lines)):
        unit = without_deadly(one, deadly)
        if unit.name in left_out:
            continue
        outcomes.append(file, "begun", name=unit.name)
        faulthandler.dump_traceback_later(longest, exit=True)
        found: dict[str, object]
        try:
            found = {"records": unit.records(others.get(unit.name, []))}
        except Exception as error:  # the other units must not miss their turn
            found = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
            failed.append(unit.name)
        finally:
            faulthandler.cancel_dump_traceback_later()
        outcomes.append(file, "unit", name=unit.name, **hashes, **found)
        print(unit.name, found.get("error", "done"), flush=True)
        gc.collect()
        if _is_spoiled():
            return 1  # another process can go on
    return FINISHED if failed else 0


def _is_spoiled() -> bool:
    """Whether the GPU answers nothing but an error to this process any more."""
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the GPU's context is lost: {error}", flush=True)
        return True
    return False


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.measurements", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args(words)
    chosen, longest = (compiled_units(), LONGEST_COMPILED) if args.compiled else (units(), LONGEST)
    return run(chosen, args.folder, args.machine, longest)


if __name__ == "__main__":
    sys.exit(main())
