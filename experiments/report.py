"""What the evidence leaves: one CSV of trainings, one of layers, the courses of some, tables and pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import bssn_fast
from benchmarks.timing.machine import processor
from experiments import plots, spectra, tables
from experiments.plan import NO_NORM, VARIANTS, Profile
from experiments.tables import Records


def write(
    out: Path,
    profile: Profile,
    records: Sequence[dict[str, Any]],
    layers: Sequence[dict[str, Any]],
    slopes: Sequence[dict[str, Any]],
) -> None:
    """Write everything into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    found = Records(profile, records)
    rounded = [_rounded(row) for row in layers]
    _csv(out / "layers.csv", rounded)
    _csv(out / "slopes.csv", [_rounded(row) for row in slopes])
    _csv(out / "trainings.csv", [_flat(record) for record in records])
    _courses(out / "courses.json", found)
    products = spectra.products(list(layers))
    machine = {
        "processor": processor(),
        "torch": torch.__version__,
        "bssn_fast": bssn_fast.__version__,
        "trainings": len(records),
        "cpu_seconds": round(sum(record["cpu_seconds"] for record in records)),
    }
    (out / "run.json").write_text(json.dumps(machine, indent=1) + "\n")
    parts = [
        "# Tables\nMedians over seeds with 95% bootstrap intervals in brackets; made by `make evidence`.\n",
        f"{machine['trainings']} trainings, {machine['cpu_seconds'] / 60:.0f} minutes of one core "
        f"({machine['processor']}, torch {machine['torch']}).\n",
        "## Gradients\n" + tables.bound_table(found),
        "## Variances in training\n" + tables.variance_table(found),
        "## Layers at initialisation\n" + tables.layers_table(layers, products),
        "## Slopes at initialisation\n" + tables.slopes_table(slopes),
        "## Stability\n" + tables.grid_table(found) + "\n" + tables.comparison_table(found),
        "## Scale\n" + tables.scale_table(found),
        "## Quality\n" + tables.quality_table(found),
    ]
    (out / "tables.md").write_text("\n".join(parts))
    plots.gradients(found, out / "gradients.png")
    plots.variances(found, out / "variances.png")
    plots.operators(layers, slopes, out / "operators.png")
    plots.stability(found, out / "stability.png")
    plots.quality(found, out / "quality.png")
    for data in profile.data:
        plots.samples(found, data, out / f"samples-{Path(data).name}.png")


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    kept = ("data", "norm", "scale", "lr_generator", "lr_discriminator", "critic_steps", "seed")
    largest = max(float(r) for r in record["bound_ratio"].values())
    return (
        {name: _round(record["settings"][name]) for name in kept}
        | {"steps": record["steps"], "diverged": int(record["diverged"])}
        | record["quality"]
        | {"bound_ratio": largest, "bound_broken_steps": record["bound_broken_steps"]}
        | {"cpu_seconds": round(record["cpu_seconds"], 1)}
    )


def _courses(path: Path, records: Records) -> None:
    """Keep what the curves of claims 1 and 2 show, one line per training."""
    p, data = records.profile, records.profile.data[0]
    runs = [run for norm in (NO_NORM, *VARIANTS) for run in records.seeds(data, norm)]
    for scale in (p.extreme_scale, p.scales[-1]):
        runs += records.seeds(data, "bssn", scale)
    lines = [json.dumps({"key": r["key"], "frechet": r["frechet"], **r["history"]}) for r in runs]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def _csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _round(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _round(value) for name, value in row.items()}
