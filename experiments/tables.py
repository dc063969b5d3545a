"""Records of trainings, looked up by setting, and the tables of the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.plan import NO_NORM, VARIANTS, Profile, Trial
from experiments.statistics import Interval, compare, median_interval

NAMES = {NO_NORM: "none", "sn": "SN", "ssn": "SSN", "bsn": "BSN", "bssn": "BSSN"}
INITIAL = {"sn": "LeCun's", "ssn": "c² LeCun's", "bsn": "Xavier's", "bssn": "c² Xavier's"}
"""The initialisation that each variant parallels."""


class Records:
    """The records of a profile's trials."""

    def __init__(self, profile: Profile, records: Iterable[dict[str, Any]]) -> None:
        self.profile = profile
        self.by_key = {record["key"]: record for record in records}

    def get(self, trial: Trial) -> dict[str, Any]:
        return self.by_key[trial.key]

    def seeds(self, data: str, norm: str, scale: float | None = None, **changes: Any) -> list[dict[str, Any]]:
        """Return the records of all seeds; a scale other than the default's chooses the trial of the sweep."""
        p = self.profile
        if scale is None:
            return [self.get(p.trial(data, norm, seed, **changes)) for seed in p.seeds_of(data, changes)]
        return [self.get(p.scaled(data, norm, scale, seed)) for seed in range(p.seeds)]

    def frechet(self, data: str, norm: str, scale: float | None = None, **changes: Any) -> list[float]:
        return [final(record) for record in self.seeds(data, norm, scale, **changes)]


def final(record: dict[str, Any]) -> float:
    """Return the Frechet distance at the end, infinite for a training that diverged."""
    return float("inf") if record["diverged"] else float(record["quality"]["frechet"])


def over_settings(records: Records) -> dict[str, list[float]]:
    """Return by variant the distances at all points of the grid of rates and with more critic steps, in one order."""
    p, data = records.profile, records.profile.data[0]
    found: dict[str, list[float]] = defaultdict(list)
    for norm in VARIANTS:
        for g, d in p.rate_pairs():
            found[norm] += records.frechet(data, norm, lr_generator=g, lr_discriminator=d)
        found[norm] += records.frechet(data, norm, critic_steps=p.critic_steps)
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def quality_table(records: Records) -> str:
    """Return claim 5's table: the scores of each variant on each kind of images."""
    columns = {
        "classifier_score": "classifier score",
        "precision": "precision",
        "recall": "recall",
        "inception_fid": "FID",
        "inception_score": "inception score",
    }
    everywhere = set.intersection(*(set(record["quality"]) for record in records.by_key.values()))
    columns = {name: title for name, title in columns.items() if name in everywhere}
    rows = []
    for data in records.profile.data:
        for norm in (NO_NORM, *VARIANTS):
            runs = records.seeds(data, norm)
            reached = [min(float(d) for _, d in run["frechet"]) for run in runs]
            scores = [median_interval([float(run["quality"][name]) for run in runs]) for name in columns]
            frechet = median_interval([final(run) for run in runs])
            diverged = sum(run["diverged"] for run in runs)
            rows.append([data, NAMES[norm], frechet, f"{min(reached):.3g}", *scores, diverged])
    head = ["data", "variant", "Frechet, median", "best", *columns.values(), "diverged"]
    return table(head, rows)


def grid_table(records: Records) -> str:
    """Return claim 4's table: Frechet distance by learning rates, critic steps and variant."""
    p, data = records.profile, records.profile.data[0]
    rows: list[list[object]] = []
    for g, d in p.rate_pairs():
        cells = [median_interval(records.frechet(data, v, lr_generator=g, lr_discriminator=d)) for v in VARIANTS]
        rows.append([f"{g:g}", f"{d:g}", 1, *cells])
    cells = [median_interval(records.frechet(data, v, critic_steps=p.critic_steps)) for v in VARIANTS]
    rows.append([f"{p.base.lr_generator:g}", f"{p.base.lr_discriminator:g}", p.critic_steps, *cells])
    whole = over_settings(records)
    rows.append(["all", "", "", *(median_interval(whole[v]) for v in VARIANTS)])
    rows.append(["worst", "", "", *(f"{max(whole[v]):.3g}" for v in VARIANTS)])
    return table(["rate of generator", "of discriminator", "critic steps", *(NAMES[v] for v in VARIANTS)], rows)


def comparison_table(records: Records) -> str:
    """Return the variants paired with SN and with each other over all settings of the grid and all seeds."""
    whole = over_settings(records)
    pairs = (("bssn", "sn"), ("ssn", "sn"), ("bsn", "sn"), ("bssn", "ssn"), ("bssn", "bsn"))
    rows = []
    for a, b in pairs:
        c = compare(whole[a], whole[b])
        rows.append([f"{NAMES[a]} against {NAMES[b]}", f"{c.wins} of {c.ratio.n}", c.ratio])
    return table(["", "lower distance", "median ratio"], rows)


def scale_medians(records: Records, norm: str) -> dict[float, Interval]:
    """Return the distance by scale of "ssn" or "bssn"; the extreme scale only where it was run."""
    p, data = records.profile, records.profile.data[0]
    scales = (p.extreme_scale, *p.scales) if norm == "bssn" else p.scales
    return {c: median_interval(records.frechet(data, norm, c)) for c in scales}


def scale_table(records: Records) -> str:
    """Return claim 4's table of the scale c."""
    ssn, bssn = scale_medians(records, "ssn"), scale_medians(records, "bssn")
    return table(["c", "SSN", "BSSN"], [[f"{c:.3g}", ssn.get(c, ""), bssn[c]] for c in bssn])


def bound_table(records: Records) -> str:
    """Return claim 1's table: the largest gradient over its bound, and the end of each training."""
    p, data = records.profile, records.profile.data[0]
    rows = []
    cases: list[tuple[str, str, float | None]] = [("none", NO_NORM, None)]
    cases += [(f"BSSN, c = {c:.3g}", "bssn", c) for c in (p.extreme_scale, p.scales[0])]
    cases += [("SN", "sn", None), ("BSN", "bsn", None), ("SSN", "ssn", None), ("BSSN", "bssn", None)]
    cases += [(f"BSSN, c = {p.scales[-1]:.3g}", "bssn", p.scales[-1])]
    for name, norm, scale in cases:
        runs = records.seeds(data, norm, scale)
        largest = max(float(r) for run in runs for r in run["bound_ratio"].values())
        critic = sum(run["steps"] * run["settings"]["critic_steps"] for run in runs)
        broken = sum(run["bound_broken_steps"] for run in runs)
        first = median_interval([float(run["history"]["slope"][0]) for run in runs])
        last = median_interval([float(run["history"]["slope"][-1]) for run in runs])
        distance = median_interval([final(run) for run in runs])
        rows.append([name, f"{largest:.3g}", f"{broken} of {critic}", first, last, distance])
    head = ["", "largest gradient / bound", "steps above the bound", "slope at the start", "at the end", "Frechet"]
    return table(head, rows)


def variance_ratios(run: dict[str, Any]) -> dict[str, list[float]]:
    """Return by layer the variance over that of the initialisation which the run's variant parallels.

    LeCun's for "sn", c^2 times it for "ssn"; Xavier's for "bsn", c^2 times it for "bssn".
    """
    norm, scale = run["settings"]["norm"], run["settings"]["scale"]
    which, factor = int(norm.startswith("b")), scale**2 if norm in ("ssn", "bssn") else 1.0
    history = run["history"]
    return {
        name: [float(v) / (factor * history["initial"][name][which]) for v in values]
        for name, values in history["variance"].items()
    }


def variance_table(records: Records) -> str:
    """Return claim 2's table: variances over those of the initialisations, at the start and at the end of training."""
    data = records.profile.data[0]
    rows = []
    for norm in VARIANTS:
        ratios = [variance_ratios(run) for run in records.seeds(data, norm)]
        starts = [v[0] for run in ratios for v in run.values()]
        ends = [v[-1] for run in ratios for v in run.values()]
        peak = max(max(v) for run in ratios for v in run.values())
        found = (median_interval(starts), median_interval(ends), f"{min(ends):.3g}", f"{peak:.3g}")
        rows.append([NAMES[norm], INITIAL[norm], *found])
    return table(["", "initialisation", "at the start", "at the end", "least at the end", "largest ever"], rows)


def layers_table(rows: Sequence[dict[str, Any]], products: Sequence[dict[str, Any]]) -> str:
    """Return claims 2 and 3 by layer set: closed forms, and operators against reshaped kernels."""
    lines = []
    for product in products:
        mine = [row for row in rows if row["set"] == product["set"]]
        sn = [row["var_sn"] / row["var_sn_closed"] for row in mine]
        bsn = [row["var_bsn"] / row["var_bsn_closed"] for row in mine if row["var_bsn_closed"]]
        ops = [row for row in mine if row["operator"]]
        over = [row["operator"] / row["s_out"] for row in ops]
        bound = [row["operator"] / row["bound"] for row in ops]
        lines.append(
            [
                product["set"],
                f"{min(sn):.3f} to {max(sn):.3f}",
                f"{min(bsn):.3f} to {max(bsn):.3f}",
                f"{min(over):.2f} to {max(over):.2f}",
                f"{max(bound):.3f}",
                f"{product['strict_over_sn']:.2g} ({product['kernels']})",
            ]
        )
    return table(
        ["layers", "SN: Var / closed", "BSN: Var / closed", "operator / s_out", "operator / bound", "product"], lines
    )


def slopes_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return claim 3's table: the slopes of the paper's network at initialisation."""
    by_norm: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_norm[row["norm"]].append(row["slope"])
    return table(["", "dD/dx at initialisation"], [[NAMES.get(n, n), median_interval(v)] for n, v in by_norm.items()])
