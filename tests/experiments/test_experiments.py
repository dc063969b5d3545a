"""The evidence: exact computations against dense algebra, intervals, the plan, and the whole program, tiny."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from math import sqrt
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gan import data
from gan.metrics import Judge, classifier_score, precision_recall
from torch.nn.functional import conv2d, pad

from benchmarks.work.layer_sets import Layer, LayerSet
from experiments import __main__ as program
from experiments import inception, plan, spectra, tables, trials
from experiments.statistics import compare, median_interval

SMALL = replace(plan.QUICK, base=replace(plan.BASE, size=8, width=4, batch=8), steps=2, log_every=1, evaluations=1)


@pytest.mark.parametrize("channels", [(6, 4), (3, 3), (4, 6)])
def test_operator_norm_is_that_of_the_dense_circular_convolution(channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(*channels, 3, 3, dtype=torch.float64)
    n = 5
    basis = torch.eye(channels[1] * n * n, dtype=torch.float64).view(-1, channels[1], n, n)
    matrix = conv2d(pad(basis, (1, 1, 1, 1), mode="circular"), weight).flatten(1)
    expected = torch.linalg.matrix_norm(matrix, 2).item()
    assert spectra.operator_norm(weight, 0, grid=n) == pytest.approx(expected, rel=1e-12)
    assert spectra.operator_norm(weight.transpose(0, 1), 1, grid=n) == pytest.approx(expected, rel=1e-12)


def test_operator_norm_of_groups_is_the_largest_of_theirs() -> None:
    weight = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    whole = spectra.operator_norm(weight, 0, groups=3, grid=8)
    assert whole == pytest.approx(max(spectra.operator_norm(part, 0, grid=8) for part in weight.chunk(3)), rel=1e-5)


def test_large_matrices_and_both_unfoldings() -> None:
    weight = torch.randn(150, 140, 3, generator=torch.Generator().manual_seed(0))
    s_out, s_in = spectra.reshaped_norms(weight, 0)
    assert s_out == pytest.approx(torch.linalg.matrix_norm(weight.flatten(1), 2).item(), rel=1e-5)
    assert s_in == pytest.approx(torch.linalg.matrix_norm(weight.transpose(0, 1).flatten(1), 2).item(), rel=1e-5)
    blocks = torch.randn(2, 150, 130, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    assert spectra.largest_singular_value(blocks) == pytest.approx(torch.linalg.svdvals(blocks).max().item(), rel=1e-5)


@pytest.mark.parametrize(
    "layer", [Layer("conv", (32, 16, 3, 3)), Layer("convT", (16, 8, 4, 4)), Layer("linear", (9, 40))]
)
def test_layers_keep_the_bound_and_come_near_the_closed_forms(layer: Layer) -> None:
    row = spectra._layer_row(layer)
    assert row["var_sn"] == pytest.approx(row["var_sn_closed"], rel=0.25)
    assert row["var_sn"] <= row["lecun"]
    if layer.kind == "linear":
        assert row["operator"] is None
        assert row["var_bsn"] == pytest.approx(row["var_sn"])
    else:
        assert row["var_bsn"] == pytest.approx(row["var_bsn_closed"], rel=0.25)
        assert row["operator"] <= row["bound"]


def test_layers_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {name: LayerSet(name, "", (Layer("conv", (4, 3, 3)),) * 2) for name in "ab"}
    rows = spectra.layer_rows(sets, tmp_path)
    monkeypatch.delattr(spectra, "_layer_row")
    assert spectra.layer_rows(sets, tmp_path) == rows
    assert [(row["set"], row["count"]) for row in rows] == [("a", 2), ("b", 2)]
    (product, _) = spectra.products(rows)
    assert product["strict_over_sn"] == pytest.approx((rows[0]["s_out"] / rows[0]["operator"]) ** 2)


def test_intervals_count_every_run() -> None:
    interval = median_interval([1.0, 2.0, 3.0, float("inf"), float("nan")])
    assert (interval.median, interval.low, interval.high, interval.n) == (3.0, 1.0, float("inf"), 5)
    many = median_interval([float(i) for i in range(101)])
    assert 35 < many.low < many.median == 50 < many.high < 65
    result = compare([1.0, 2.0, 3.0, float("inf")], [2.0, 4.0, 1.0, float("inf")])
    assert (result.wins, result.ratio.median) == (2, 0.75)
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


def test_plan_has_each_trial_once_and_five_seeds_of_all() -> None:
    keys = [trial.key for trial in plan.CPU.trials()]
    assert len(keys) == len(set(keys))
    per_seed = [sum(trial.settings.seed == seed for trial in plan.CPU.trials()) for seed in range(5)]
    assert len(set(per_seed)) == 1
    assert len(keys) == sum(per_seed)
    assert plan.CPU.scaled("digits", "bssn", 1.0, 0).settings.norm == "bsn"
    assert plan.CPU.scaled("digits", "ssn", 1.0, 0).settings.norm == "sn"
    assert plan.CPU.scaled("digits", "bssn", sqrt(2), 0).key == plan.CPU.trial("digits", "bssn", 0).key


@pytest.mark.parametrize("norm", ["none", "bssn"])
def test_watched_gradients_are_those_of_the_normalised_weights(norm: str) -> None:
    torch.manual_seed(0)
    images = data.load("digits", 8, "")
    settings = replace(SMALL.base, norm=norm)
    run = trials.WatchedRun(settings, images, torch.device("cpu"))
    lengths = []
    for _ in range(2):
        run.step()
        lengths.append({name: gradient.norm().item() for name, gradient in run.gradients.items()})
        if norm == "none":
            own = {n: m.weight.grad.norm().item() for n, m in trials.weight_layers(run.discriminator).items()}
            assert lengths[-1] == pytest.approx(own, rel=1e-4)
    assert lengths[0].keys() == trials.weight_layers(run.discriminator).keys()
    assert 0 < max(run.ratio.values()) < 1
    assert run.bound_broken == 0


def test_slope_is_the_scale_of_a_linear_discriminator() -> None:
    images = data.load("digits", 8, "")
    run = trials.WatchedRun(SMALL.base, images, torch.device("cpu"))
    small = run.slope()
    with torch.no_grad():
        head = run.discriminator.head
        run.discriminator.head = torch.nn.Linear(head.in_features, 1)
        run.discriminator.head.weight.copy_(3 * head.weight)
    assert run.slope() == pytest.approx(3 * small, rel=1e-4)


def test_a_training_that_diverges_is_recorded_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.WatchedRun, "step", lambda self: (float("nan"), 0.0))
    record = trials.run_trial(SMALL.trial("digits", "sn", 0))
    assert record["diverged"]
    assert tables.final(record) == math.inf


def test_scores_of_real_and_of_constant_images() -> None:
    images = data.load("digits", 8, "")
    some = data.Images(images.pixels[:300], images.labels[:300], images.classes)
    judge = Judge(some)
    same, flat = judge.quality(some.pixels), judge.quality(torch.zeros_like(some.pixels))
    assert (same.precision, same.recall) == (1, 1)
    assert (flat.precision, flat.recall) == (0, 0) or flat.recall < 0.05
    assert flat.classifier_score == pytest.approx(1, abs=1e-6)
    assert 5 < same.classifier_score <= 10
    broken = judge.quality(torch.full_like(some.pixels, float("nan")))
    assert (broken.frechet, broken.classifier_score, broken.precision) == (math.inf, 1, 0)


def test_precision_and_recall_tell_missing_from_wrong() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.cat([torch.randn(50, 2, generator=generator), torch.randn(50, 2, generator=generator) + 100])
    one_of_two = torch.randn(50, 2, generator=generator)
    precision, recall = precision_recall(real.double(), one_of_two.double())
    assert precision > 0.8
    assert 0.3 < recall <= 0.5


def test_classifier_score_needs_variety() -> None:
    judge = Judge(data.load("digits", 8, ""))
    one = judge.real.pixels[:1].expand(20, -1, -1, -1)
    assert classifier_score(judge.classifier, one) == pytest.approx(1, abs=1e-6)


def test_photos_ship_with_a_dependency() -> None:
    images = data.load("photos", 16, "")
    assert images.pixels.shape[1:] == (3, 16, 16)
    assert images.pixels.abs().max() <= 1
    assert images.labels.bincount().min() > 100
    assert len(images.labels.bincount()) == len(images.classes) == 8


def test_inception_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = torch.zeros(2, 1, 8, 8)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(inception.InceptionUnavailableError, match="pip install torch-fidelity"):
        inception.fid_and_score(images, images)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(inception.InceptionUnavailableError, match=r"no Inception weights at .*absent\.pth"):
        inception.fid_and_score(images, images, tmp_path / "absent.pth")
    assert inception._Bytes(images)[0].shape == (3, 8, 8)


def test_program_refuses_inception_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--quick", "--inception", str(tmp_path / "absent.pth"), "--work", str(tmp_path)])
    assert "--inception: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_inception_scores_come_from_torch_fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.touch()
    fidelity = ModuleType("torch_fidelity")
    fidelity.__spec__ = ModuleSpec("torch_fidelity", None)
    given: dict[str, object] = {}

    def calculate_metrics(**options: object) -> dict[str, float]:
        given.update(options)
        return {"frechet_inception_distance": 12.5, "inception_score_mean": 3.0}

    fidelity.calculate_metrics = calculate_metrics
    monkeypatch.setitem(sys.modules, "torch_fidelity", fidelity)
    record = trials.run_trial(SMALL.trial("digits", "sn", 0), "", "cpu", weights)
    assert (record["quality"]["inception_fid"], record["quality"]["inception_score"]) == (12.5, 3.0)
    assert given["feature_extractor_weights_path"] == str(weights)
    assert given["input2"][0].dtype == torch.uint8


def test_program_resumes_and_writes_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = replace(SMALL, data=("digits",), scales=(0.7, 1.0, sqrt(2)), seeds=1)
    monkeypatch.setattr(plan, "QUICK", tiny)
    monkeypatch.setattr(program, "QUICK_SETS", ())
    row = spectra._layer_row(Layer("conv", (4, 3, 3, 3)))
    monkeypatch.setattr(spectra, "layer_rows", lambda sets, folder: [{"set": "bsn_cnn_d32", "count": 2, **row}])
    monkeypatch.setattr(spectra, "slopes", lambda seeds: [{"norm": "sn", "seed": 0, "slope": 1.0}])
    first, *others = tiny.trials()
    done = {norm: trials.run_trial(tiny.trial("digits", norm, 0)) for norm in ("none", *plan.VARIANTS)}
    (tmp_path / "trainings").mkdir()
    for trial in others:  # their records are there already
        record = {**done[trial.settings.norm], "key": trial.key}
        (tmp_path / "trainings" / f"{trial.key}.json").write_text(json.dumps(record))
    results = program.main(["--quick", "--work", str(tmp_path), "--workers", "1"])
    assert results == tmp_path / "results"
    report = (results / "tables.md").read_text()
    assert (tmp_path / "trainings" / f"{first.key}.json").exists()
    assert f"{len(tiny.trials())} trainings" in report
    for section in ("Gradients", "Variances in training", "Stability", "Scale", "Quality"):
        assert f"## {section}" in report
    assert len((results / "trainings.csv").read_text().splitlines()) == 1 + len(tiny.trials())
    names = {path.name for path in results.glob("*.png")}
    assert names == {
        f"{n}.png" for n in ("gradients", "variances", "operators", "stability", "quality", "samples-digits")
    }
