"""The whole program, tiny, and what its report is made of."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks.work.layer_sets import Layer
from experiments import __main__ as program
from experiments import plan, switching
from experiments.measures import depth, scores, spectra
from experiments.shown import frames, report, tables
from experiments.trainings import captured, pool

TINY = replace(plan.QUICK, seeds=2)


def record(trial: plan.Trial, frechet: float = 1.0, diverged: bool = False) -> dict[str, Any]:
    """Return what a training of this trial could have left."""
    settings = {name: getattr(trial.settings, name) for name in trial.settings.__dataclass_fields__}
    scored = {"frechet": frechet, "precision": 0.5, "recall": 0.5, "density": 0.5, "coverage": 0.5}
    return {
        "key": trial.key,
        "study": trial.study,
        "settings": settings,
        "steps": trial.steps,
        "diverged": diverged,
        "bound_ratio": 0.5,
        "bound_broken_steps": 0,
        "course": {
            "step": [1, trial.steps],
            "slope": [0.1, "inf" if diverged else 0.2],
            "gradient": {"first": [1.0, 2.0], "last": [3.0, 4.0]},
            "variance": {"first": [0.5, 0.25]},
        },
        "initial": {"first": (0.25, 0.5)},
        "cpu_seconds": 1.0,
        "wall_seconds": 2.0,
        **({"scores": scored, "samples": [[[[0] * 8] * 8] * 3] * 10} if trial.scored else {}),
    }


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make everything that is computed without training small."""
    row = spectra._layer_row(Layer("conv", (4, 3, 3, 3)))
    monkeypatch.setattr(spectra, "layer_rows", lambda sets, folder: [{"set": "bsn_cnn_d32", "count": 2, **row}])
    monkeypatch.setattr(spectra, "slopes", lambda seeds: [{"norm": "sn", "seed": 0, "slope": 1.0}])
    monkeypatch.setattr(depth, "SETTLING", 1)
    monkeypatch.setattr(depth, "SCALES", (0.3, 1.0, plan.SQRT2, 4.0))
    monkeypatch.setattr(scores, "REAL", 40)
    monkeypatch.setattr(scores, "GENERATED", 20)
    monkeypatch.setattr(switching, "CRITIC_STEPS", 1)


def test_program_resumes_and_writes_its_report(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "QUICK", TINY)
    missing = next(trial for trial in TINY.trials() if not trial.scored)
    folder = tmp_path / "trainings"
    folder.mkdir()
    for trial in TINY.trials():  # the records of all others are there already
        if trial != missing:
            pool.file_of(folder, trial).write_text(json.dumps(record(trial)))
    results = program.main(["--quick", "--work", str(tmp_path), "--workers", "1"])
    assert results == tmp_path / "results"
    text = (results / "tables.md").read_text()
    assert pool.file_of(folder, missing).exists()
    assert f"{len(TINY.trials())} of {len(TINY.trials())} trainings" in text
    assert text.count("\n## ") == 12
    assert "Not run." not in text
    assert len((results / "trainings.csv").read_text().splitlines()) == 1 + len(TINY.trials())
    pictures = {path.stem for path in results.glob("*.png")}
    drawn = {"depth", "variances", "operators", "stability", "quality", "switching"}
    assert pictures == drawn | {"samples-mnist"}
    (results / "depth.png").unlink()
    program.main(["--quick", "--show", "--work", str(tmp_path)])  # from the CSV files alone
    assert (results / "tables.md").read_text() == text
    assert (results / "depth.png").exists()


def test_only_settings_with_all_their_seeds_are_told(tmp_path: Path) -> None:
    trials = TINY.trials()
    records = [record(trial) for trial in trials if (trial.settings.norm, trial.settings.seed) != ("sn", 1)]
    found = report.collect(
        TINY, report.told(TINY, records), {"initial": [], "references": [], "switching": [], "slopes": [], "layers": []}
    )
    for frame in (found.trainings, found.courses, found.variances):
        assert "sn" not in set(frame["norm"])
        assert "bsn" in set(frame["norm"])
    found.write(tmp_path)
    again = frames.Frames.read(tmp_path)
    pd.testing.assert_frame_equal(again.trainings, found.trainings, check_dtype=False)
    assert "none" in set(again.trainings["norm"])
    assert len(again.layers) == 0


def test_a_diverged_run_is_the_worst_and_is_counted() -> None:
    trials = [t for t in TINY.trials() if t.study in ("variants", "rates") and t.settings.data == "mnist"]
    fast = {t.key for t in trials if t.study == "rates" and t.settings.norm == "none"}
    records = [record(t, frechet=2.0 + t.settings.seed, diverged=t.key in fast) for t in trials]
    found = report.collect(
        TINY, report.told(TINY, records), {"initial": [], "references": [], "switching": [], "slopes": [], "layers": []}
    )
    diverged = found.trainings[found.trainings["diverged"] == 1]
    assert len(diverged) == TINY.seeds
    assert np.isinf(diverged["frechet"]).all()
    table = tables.rate_table(found, TINY)
    assert "inf [inf, inf]; 2 of 2 diverged" in table
    assert "2.5 [2, 3]" in table
    assert "| SN against none | 2 of 4 |" in " ".join(tables.comparison_table(found, TINY).split())
    assert math.inf in set(found.courses["slope"])


def test_variances_are_over_those_of_the_variants_initialisation() -> None:
    trials = [t for t in TINY.variants("mnist") if t.settings.norm in ("sn", "bssn")]
    ratios = frames.variances([record(t) for t in trials]).groupby("norm")["ratio"].first()
    assert ratios["sn"] == pytest.approx(0.5 / 0.25)
    assert ratios["bssn"] == pytest.approx(0.5 / (2 * 0.5))


def test_gpu_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []

    def run_for(trials: list[plan.Trial], folder: Path, seconds: float, *_: object) -> int:
        asked.extend((len(trials), seconds))
        folder.mkdir()
        for trial in trials[:25]:
            pool.file_of(folder, trial).write_text(json.dumps(record(trial)))
        return len(trials) - 25

    monkeypatch.setattr(captured, "run_for", run_for)
    results = program.main(["--gpu", "--work", str(tmp_path), "--results", str(tmp_path / "out"), "--minutes", "2"])
    planned = len(plan.GPU.trials())
    assert asked == [planned, 120]
    assert f"{planned - 25} of {planned} trainings are left" in capsys.readouterr().out
    assert f"25 of {planned} trainings" in (results / "tables.md").read_text()


def test_results_of_other_options_do_not_replace_those_of_the_repository() -> None:
    parse = program.make_parser().parse_args
    committed = Path(program.__file__).with_name("results")
    assert program.choose_results(parse([])) == committed
    assert program.choose_results(parse(["--gpu"])) == committed / "gpu"
    for options in (["--quick"], ["--steps", "3"], ["--data", "photos"], ["--network", "residual"]):
        assert program.choose_results(parse([*options, "--work", "w"])) == Path("w/results")
    assert program.choose_results(parse(["--results", "r"])) == Path("r")
    profile = program.choose_profile(parse(["--data", "photos", "--network", "residual", "--seeds", "3"]))
    assert (profile.base.data, profile.base.network, profile.others, profile.seeds) == ("photos", "residual", {}, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--data", "nowhere"], "nor an existing folder"), (["--inception", "absent.pth"], "--inception: ")],
)
def test_wrong_options_end_before_anything_is_computed(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main(["--quick", *options, "--work", str(tmp_path)])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
