"""What the evidence leaves: CSV files, tables, pictures."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import bssn_fast
from benchmarks.timing.machine import processor
from experiments.plan import NORMS, Profile
from experiments.shown import frames as made
from experiments.shown import plots, tables
from experiments.shown.frames import Frames


def told(profile: Profile, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of those settings that have all their seeds: the others are left out until they have."""
    trainings = made.trainings(records)
    if not len(trainings):
        return []
    whole = made.complete(trainings, profile.seeds).index
    return [record for i, record in enumerate(records) if i in whole]


def collect(profile: Profile, records: Sequence[dict[str, Any]], exact: dict[str, list[dict[str, Any]]]) -> Frames:
    """Return all results.

    exact: the rows of what is computed without training, by the name of their frame.
    """
    base = [r for r in records if r["study"] == "variants" and r["settings"]["data"] == profile.base.data]
    own = [r for r in base if r["settings"]["norm"] != "none"]
    others = {name: pd.DataFrame(rows) for name, rows in exact.items()}
    return Frames(made.trainings(records), made.courses(records), made.variances(own), **others)


def about(records: Sequence[dict[str, Any]], planned: int) -> dict[str, Any]:
    """Return what was run where."""
    return {
        "processor": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "bssn_fast": bssn_fast.__version__,
        "trainings": len(records),
        "planned": planned,
        "cpu_seconds": round(sum(record["cpu_seconds"] for record in records)),
        "wall_seconds": round(sum(record["wall_seconds"] for record in records)),
    }


def write(
    out: Path, profile: Profile, records: Sequence[dict[str, Any]], exact: dict[str, list[dict[str, Any]]]
) -> None:
    """Write everything into the folder `out`."""
    records = told(profile, records)
    collect(profile, records, exact).write(out)
    (out / "run.json").write_text(json.dumps(about(records, len(profile.trials())), indent=1) + "\n")
    for data in (profile.base.data, *profile.others):
        mine = [r for r in records if r["settings"]["data"] == data and r["study"] == "variants" and r.get("samples")]
        shown = {record["settings"]["norm"]: record for record in mine}
        if len(shown) == len(NORMS):
            plots.samples([shown[norm] for norm in NORMS], out / f"samples-{Path(data).name}.png")
    show(out, profile)


def show(folder: Path, profile: Profile) -> None:
    """Write tables and pictures from the CSV files in `folder`."""
    found, run = Frames.read(folder), json.loads((folder / "run.json").read_text())
    minutes = f"{run['cpu_seconds'] / 60:.0f} minutes of one core"
    parts = [
        "# Tables\nMedians over seeds with 95% bootstrap intervals in brackets; made by `make evidence`.\n",
        f"{run['trainings']} of {run['planned']} trainings, {minutes} ({run['processor']}, torch {run['torch']}).\n",
    ]
    with_trainings = len(found.trainings) > 0
    sections = [
        ("Gradients at initialisation", len(found.initial), lambda: tables.initial_table(found)),
        ("Gradients in training", with_trainings, lambda: tables.course_table(found)),
        ("Learning rates until it explodes", with_trainings, lambda: tables.explosion_table(found)),
        ("The bound on gradients", "bound_ratio" in found.trainings, lambda: tables.bound_table(found, profile)),
        ("Variances in training", len(found.variances), lambda: tables.variance_table(found)),
        ("Layers at initialisation", len(found.layers), lambda: tables.layers_table(found)),
        ("Strict normalisation", len(found.slopes), lambda: tables.slopes_table(found)),
        ("Learning rates", with_trainings, lambda: tables.rate_table(found, profile)),
        ("Scale", with_trainings, lambda: tables.scale_table(found, profile)),
        ("Quality", with_trainings, lambda: tables.quality_table(found)),
        ("Pairs", with_trainings, lambda: tables.comparison_table(found, profile)),
        ("Switching", len(found.switching), lambda: tables.switching_table(found)),
    ]
    parts += [f"## {title}\n{make()}" for title, there, make in sections if there]
    (folder / "tables.md").write_text("\n".join(parts))
    if len(found.initial) and with_trainings:
        plots.depth(found, folder / "depth.png")
    if len(found.variances):
        plots.variances(found, folder / "variances.png")
    if len(found.layers) and len(found.slopes):
        plots.operators(found, folder / "operators.png")
    if with_trainings:
        plots.stability(found, profile, folder / "stability.png")
        plots.quality(found, folder / "quality.png")
    if len(found.switching):
        plots.switching(found, folder / "switching.png")
