"""The tables of the report, in Markdown by pandas."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import pandas as pd

from experiments.measures.statistics import compare, median_interval
from experiments.plan import DEPTHS, SQRT2, Profile
from experiments.shown.frames import NAMES, SETTING, Frames, in_order, label

PAIRS = (("sn", "none"), ("bssn", "none"), ("ssn", "sn"), ("bsn", "sn"), ("bssn", "sn"), ("bssn", "ssn"))


def markdown(rows: Iterable[dict[str, object]] | pd.DataFrame) -> str:
    """Return a table in Markdown, or a sentence where there is nothing."""
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    if not len(frame):
        return "Not run.\n"
    text = frame.astype(object).where(frame.notna(), "")
    return text.to_markdown(index=False, disable_numparse=True) + "\n"


def study(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Return the rows of these studies."""
    return frame[frame["study"].isin(names)]


def base_case(frame: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Return all variants at the base's images, with their default scale: the first row of several studies."""
    return frame[(frame["study"] == "variants") & (frame["data"] == profile.base.data)]


def by_case(frame: pd.DataFrame) -> list[tuple[tuple[str, float], pd.DataFrame]]:
    """Return ((normalisation, scale), rows) in the order of all tables and pictures."""
    groups = dict(list(frame.groupby(["norm", "scale"])))
    return [
        ((norm, scale), groups[norm, scale])
        for norm in in_order(list(frame["norm"]))
        for n, scale in groups
        if n == norm
    ]


def initial_table(frames: Frames) -> str:
    """Claim 1: slopes at initialisation by depth, and what each further layer multiplies them by."""
    rows = []
    for case, mine in by_case(frames.initial):
        row: dict[str, object] = {"": label(*case)}
        medians = {}
        for layers, part in mine.groupby("layers"):
            row[f"{layers} layers"] = median_interval(list(part["slope"]))
            medians[layers] = part["slope"].median()
        least, most = min(medians), max(medians)
        if most > least and medians[least]:
            row["each further layer: times"] = f"{(medians[most] / medians[least]) ** (1 / (most - least)):.2g}"
        rows.append(row)
    return markdown(rows)


def course_table(frames: Frames) -> str:
    """Claim 1: slopes in training at several depths, at the first and the last recorded step; runs that diverged."""
    diverged = dict(list(study(frames.trainings, "depth").groupby(["norm", "scale", "layers"])["diverged"]))
    rows = []
    for case, mine in by_case(study(frames.courses, "depth")):
        row: dict[str, object] = {"": label(*case)}
        for layers, part in mine.groupby("layers"):
            slopes = part.sort_values("step").groupby("seed")["slope"]
            row[f"{layers} layers: start"] = median_interval(list(slopes.first()))
            row[f"{layers}: end"] = median_interval(list(slopes.last()))
            own = diverged[(*case, layers)]
            row[f"{layers}: diverged"] = f"{own.sum()} of {len(own)}"
        rows.append(row)
    return markdown(rows)


def explosions(frames: Frames) -> pd.DataFrame:
    """Return the short trainings at the paper's depth, at all rates, with the largest slope of each in `slope`."""
    own = [name for name in SETTING if name != "study"]
    both = study(frames.trainings, "depth", "explosion").merge(
        study(frames.courses, "depth", "explosion").groupby(own)["slope"].max().reset_index(), on=own
    )
    default = ~both["norm"].isin(("ssn", "bssn")) | both["scale"].sub(SQRT2).abs().lt(1e-3)
    return both[(both["layers"] == DEPTHS["paper"]) & default]


def explosion_table(frames: Frames) -> str:
    """Claim 1: how many runs diverge at which learning rate, and the largest slope seen."""
    rows = []
    for rate, part in explosions(frames).groupby("rate"):
        row: dict[str, object] = {"learning rate": f"{rate:g}"}
        for norm in in_order(list(part["norm"])):
            mine = part[part["norm"] == norm]
            row[f"{NAMES[norm]}: diverged"] = f"{mine['diverged'].sum()} of {len(mine)}"
            row[f"{NAMES[norm]}: largest slope"] = f"{mine['slope'].median():.2g}"
        rows.append(row)
    return markdown(rows)


def bound_table(frames: Frames, profile: Profile) -> str:
    """Claim 1: the largest gradient of a layer over the paper's bound, at the base's images and rate."""
    mine = study(frames.trainings, "variants", "scales")
    mine = mine[mine["data"] == profile.base.data]
    rows = []
    for case, part in by_case(mine):
        largest, ours = part["bound_ratio"], part["bound_broken_steps"].sum()
        rows.append(
            {
                "": label(*case),
                "largest gradient / bound, median run": f"{largest.median():.3g}",
                "worst run": f"{largest.max():.3g}",
                "steps above the bound": f"{ours:.0f} of {part['steps'].sum():.0f}",
            }
        )
    return markdown(rows)


def _cell(part: pd.DataFrame) -> str:
    """Return the median distance, and how many runs diverged if any did."""
    diverged = int(part["diverged"].sum())
    text = str(median_interval(list(part["frechet"])))
    return f"{text}; {diverged} of {len(part)} diverged" if diverged else text


def all_rates(frames: Frames, profile: Profile) -> pd.DataFrame:
    """Return all variants with their default scale, at all learning rates and numbers of critic steps."""
    return pd.concat([base_case(frames.trainings, profile), study(frames.trainings, "rates", "critic")])


def rate_table(frames: Frames, profile: Profile) -> str:
    """Claim 4: Frechet distance by learning rate and variant."""
    rows = []
    for (rate, critic), part in all_rates(frames, profile).groupby(["rate", "critic_steps"]):
        by_norm = dict(list(part.groupby("norm")))
        cells = {NAMES[n]: _cell(by_norm[n]) for n in in_order(list(by_norm))}
        rows.append({"learning rate": f"{rate:g}", "critic steps": critic, **cells})
    return markdown(rows)


def all_scales(frames: Frames, profile: Profile) -> pd.DataFrame:
    """Return SSN and BSSN, in the column `norm`, with all scales; 1 is SN and BSN."""
    found = pd.concat([base_case(frames.trainings, profile), study(frames.trainings, "scales")])
    found = found[found["norm"] != "none"]
    return found.assign(norm=found["norm"].replace({"sn": "ssn", "bsn": "bssn"}), scale=found["scale"].round(3))


def scale_table(frames: Frames, profile: Profile) -> str:
    """Claim 4: Frechet distance by scale c; 1 is SN and BSN."""
    rows = []
    for scale, part in all_scales(frames, profile).groupby("scale"):
        by_norm = dict(list(part.groupby("norm")))
        rows.append({"c": f"{scale:.3g}", **{NAMES[norm]: _cell(mine) for norm, mine in sorted(by_norm.items())[::-1]}})
    return markdown(rows)


def comparison_table(frames: Frames, profile: Profile) -> str:
    """Claims 4 and 5: variants paired by seed, for each kind of images and learning rate, and BSSN's scales."""
    rows = []
    groups = dict(list(study(frames.trainings, "variants").groupby("data", sort=False)))
    rates = study(frames.trainings, "rates")
    groups |= {f"{profile.base.data}, learning rate {rate:g}": part for rate, part in rates.groupby("rate")}
    if len(rates):
        groups[f"{profile.base.data}, all learning rates"] = all_rates(frames, profile)
    for title, part in groups.items():
        by_norm = {NAMES[norm]: mine for norm, mine in part.groupby("norm")}
        rows += [_pair(title, NAMES[a], NAMES[b], by_norm) for a, b in PAIRS]
    scaled = pd.concat([base_case(frames.trainings, profile), study(frames.trainings, "scales")])
    cases = {label(*case): mine for case, mine in by_case(scaled)}
    for scale in profile.scales:
        rivals = [NAMES[norm] for norm in ("none", "sn", "ssn", "bssn")] + [label("ssn", scale)]
        rows += [_pair(profile.base.data, label("bssn", scale), rival, cases) for rival in rivals]
    return markdown(row for row in rows if row)


def _pair(title: str, a: str, b: str, cases: dict[str, pd.DataFrame]) -> dict[str, object]:
    """Return a row on two cases with the same settings and seeds; an empty one where one of them is missing."""
    if not (a in cases and b in cases and len(cases[a]) == len(cases[b])):
        return {}
    first, second = (cases[name].sort_values(["rate", "critic_steps", "seed"]) for name in (a, b))
    c = compare(list(first["frechet"]), list(second["frechet"]), list(first["seed"]))
    return {"images": title, "": f"{a} against {b}", "nearer": f"{c.wins} of {c.pairs}", "ratio of distances": c.ratio}


def quality_table(frames: Frames) -> str:
    """Claim 5: all scores of all variants on each kind of images."""
    scores = ["frechet", "precision", "recall", "density", "coverage", "classifier_frechet"]
    rows = []
    for data, part in study(frames.trainings, "variants").groupby("data", sort=False):
        for norm in in_order(list(part["norm"])):
            mine = part[part["norm"] == norm]
            found = {s: median_interval(list(mine[s])) for s in scores if s in mine and mine[s].notna().any()}
            best = f"{mine['frechet'].min():.3g}"
            rows.append(
                {"images": data, "": NAMES[norm], **found, "best": best, "diverged": int(mine["diverged"].sum())}
            )
        for _, other in (
            frames.references[frames.references["data"] == data].iterrows() if len(frames.references) else ()
        ):
            rows.append(
                {"images": data, "": "other real images"}
                | {s: f"{other[s]:.3g}" for s in scores if s in other and pd.notna(other[s])}
            )
    return markdown(rows)


def variance_table(frames: Frames) -> str:
    """Claim 2: variances over those of the initialisations, at the start, at the end and at most."""
    rows = []
    v = frames.variances
    for norm in in_order(list(v["norm"])):
        mine = v[v["norm"] == norm]
        ends = mine[mine["step"] == mine["step"].max()]["ratio"]
        rows.append(
            {
                "": NAMES[norm],
                "initialisation": INITIAL[norm],
                "at step 1": median_interval(list(mine[mine["step"] == 1]["ratio"])),
                "at the end": median_interval(list(ends)),
                "least at the end": f"{ends.min():.3g}",
                "largest ever": f"{mine['ratio'].max():.3g}",
            }
        )
    return markdown(rows)


INITIAL = {"sn": "LeCun's", "ssn": "c² LeCun's", "bsn": "Xavier's", "bssn": "c² Xavier's"}
"""The initialisation that each variant parallels."""


def _span(values: pd.Series, digits: int) -> str:
    return f"{values.min():.{digits}f} to {values.max():.{digits}f}"


def layers_table(frames: Frames) -> str:
    """Claims 2 and 3 by network: closed forms, and operators against reshaped kernels."""
    rows = []
    for name, mine in frames.layers.groupby("set", sort=False):
        ops = mine[mine["operator"].notna()]
        product = prod(
            (row.s_out / row.operator) ** row.count_ for row in ops.rename(columns={"count": "count_"}).itertuples()
        )
        rows.append(
            {
                "layers": name,
                "SN: Var / closed": _span(mine["var_sn"] / mine["var_sn_closed"], 3),
                "BSN: Var / closed": _span((mine["var_bsn"] / mine["var_bsn_closed"]).dropna(), 3),
                "operator / s_out": _span(ops["operator"] / ops["s_out"], 2),
                "operator / bound": f"{(ops['operator'] / ops['bound']).max():.3f}",
                "product": f"{product:.2g} ({ops['count'].sum()})",
            }
        )
    return markdown(rows)


def slopes_table(frames: Frames) -> str:
    """Claim 3: the slopes of the paper's network at initialisation, strict normalisation among them."""
    parts = frames.slopes.groupby("norm", sort=False)["slope"]
    return markdown({"": NAMES.get(n, n), "dD/dx at initialisation": median_interval(list(v))} for n, v in parts)


def narrow(switching: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that compare losses; those of the widest network compare seconds."""
    return switching[switching["width"] == switching["width"].min()]


def switching_table(frames: Frames) -> str:
    """The switched training: how far the losses are apart, and the seconds of a step of the network in full."""
    rows = []
    for precision, mine in narrow(frames.switching).groupby("precision"):
        for loss in ("discriminator", "generator"):
            row: dict[str, object] = {"precision": precision, "steps": len(mine), "loss of the": loss}
            for way, name in (("sn", "`sn`"), ("rounded", "a rounding error")):
                apart = (mine[f"{loss}_{way}"] - mine[f"{loss}_torch"]).abs()
                row[f"torch and {name}: first step"] = f"{apart.iloc[0]:.1e}"
                row[f"{name}: largest"] = f"{apart.max():.1e}"
            rows.append(row)
    wide = frames.switching[frames.switching["width"] == frames.switching["width"].max()]
    seconds = {"torch": wide["seconds_torch"], "`sn`": wide["seconds_sn"]}
    seconds["torch less `sn`, step by step"] = wide["seconds_torch"] - wide["seconds_sn"]
    times = [{"": name, "seconds of a step, median": median_interval(list(s))} for name, s in seconds.items()]
    return markdown(rows) + "\n" + markdown(times)
