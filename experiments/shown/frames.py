"""Results as data frames, each of them a CSV file: what tables and pictures are made of, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.plan import DEPTHS, NO_NORM, NORMS, SQRT2

Rows = Sequence[dict[str, Any]]
NAMES = {NO_NORM: "none", "sn": "SN", "ssn": "SSN", "bsn": "BSN", "bssn": "BSSN"}
SETTING = ["study", "data", "network", "layers", "norm", "scale", "rate", "critic_steps", "seed"]
"""What tells one training from another."""


@dataclass(frozen=True)
class Frames:
    """Everything that was found; a frame that was not made is empty."""

    trainings: pd.DataFrame
    """One row a training: its setting, whether it diverged, its scores."""
    courses: pd.DataFrame
    """One row a training and recorded step: slope of the discriminator, gradients of its first and last layer."""
    variances: pd.DataFrame
    """One row a layer and recorded step of the base's trainings: variance over that of the initialisation."""
    initial: pd.DataFrame
    """One row a depth, normalisation and seed: the slope before training."""
    layers: pd.DataFrame
    """One row a layer of the seven published networks: variances, kernels and convolution operators."""
    slopes: pd.DataFrame
    """One row a normalisation and seed: the slope at the start, "strict" being division by the operator's norm."""
    switching: pd.DataFrame
    """One row a step of the switched training: losses and seconds."""
    references: pd.DataFrame
    """One row a kind of images: the scores of other real images."""

    def write(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        for field in fields(self):
            frame = getattr(self, field.name)
            if len(frame):
                digits = "%.17g" if field.name == "switching" else "%.6g"  # differences of losses are what counts there
                frame.to_csv(out / f"{field.name}.csv", index=False, float_format=digits, lineterminator="\n")

    @classmethod
    def read(cls, folder: Path) -> Frames:
        files = {field.name: folder / f"{field.name}.csv" for field in fields(cls)}
        return cls(**{name: _read(file) if file.exists() else pd.DataFrame() for name, file in files.items()})


def _read(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, keep_default_na=False, na_values=[""])  # "none" is a name


def label(norm: str, scale: float) -> str:
    """Return what a case is called; a scale is named where it is not the default."""
    scaled = norm in ("ssn", "bssn") and abs(scale - SQRT2) > 1e-3
    return f"{NAMES[norm]}, c = {scale:.3g}" if scaled else NAMES[norm]


def setting(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record's setting; the scale of what has none is 1."""
    s = record["settings"]
    return {
        "study": record["study"],
        "data": s["data"],
        "network": s["network"],
        "layers": DEPTHS.get(s["network"], 0),
        "norm": s["norm"],
        "scale": s["scale"] if s["norm"] in ("ssn", "bssn") else 1.0,
        "rate": s["lr_discriminator"],
        "critic_steps": s["critic_steps"],
        "seed": s["seed"],
    }


def trainings(records: Rows) -> pd.DataFrame:
    """Return one row a training. A diverged one has the worst distance, whatever its last images were."""
    rows = []
    for record in records:
        scores = {name: float(value) for name, value in record.get("scores", {}).items()}
        if record["diverged"]:
            scores |= {name: np.inf for name in scores if name.endswith("frechet")}
        bound = {name: float(record[name]) for name in ("bound_ratio", "bound_broken_steps") if name in record}
        rows.append(
            {**setting(record), "steps": record["steps"], "diverged": int(record["diverged"])}
            | scores
            | bound
            | {"cpu_seconds": record["cpu_seconds"]}
        )
    return pd.DataFrame(rows)


def courses(records: Rows) -> pd.DataFrame:
    """Return one row a training and recorded step."""
    parts = []
    for record in records:
        course, gradients = record["course"], list(record["course"]["gradient"].values())
        columns = {"step": course["step"], "slope": course["slope"]}
        if gradients:
            columns |= {"gradient_first": gradients[0], "gradient_last": gradients[-1]}
        length = min(map(len, columns.values()))
        frame = pd.DataFrame({name: values[:length] for name, values in columns.items()}).astype(float)
        parts.append(frame.assign(**setting(record))[[*SETTING, *columns]])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def variances(records: Rows) -> pd.DataFrame:
    """Return by layer and step the variance over that of the initialisation that the variant parallels.

    LeCun's for "sn", c^2 times it for "ssn"; Xavier's for "bsn", c^2 times it for "bssn".
    """
    rows = []
    for record in records:
        where = setting(record)
        which = int(where["norm"].startswith("b"))
        for name, values in record["course"]["variance"].items():
            own = where["scale"] ** 2 * record["initial"][name][which]
            fan_in = round(1 / record["initial"][name][0])
            for step, value in zip(record["course"]["step"], values, strict=True):
                at = {"norm": where["norm"], "seed": where["seed"], "layer": name, "fan_in": fan_in, "step": step}
                rows.append(at | {"ratio": float(value) / own})
    return pd.DataFrame(rows)


def complete(frame: pd.DataFrame, seeds: int) -> pd.DataFrame:
    """Return the rows of those settings that have all seeds: a variant is compared on all of them or not at all."""
    others = [name for name in SETTING if name != "seed"]
    return frame[frame.groupby(others)["seed"].transform("nunique") >= seeds]


def in_order(norms: Sequence[str]) -> list[str]:
    """Return norms in the order of all tables and pictures."""
    return [norm for norm in NORMS if norm in set(norms)]
