"""The plan, one watched training, and trainings on a GPU for a given time, whose graphs are stood in for here."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gan import data
from gan.networks import NETWORKS, weight_layers

from experiments import plan
from experiments.measures import scores
from experiments.trainings import captured, pool, trial

SMALL = replace(plan.QUICK, base=replace(plan.BASE, data="digits", size=8, width=4, batch=8), steps=2, log_every=1)


@pytest.fixture(scope="module")
def digits() -> data.Images:
    return data.load("digits", 8, "")


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "REAL", 40)
    monkeypatch.setattr(scores, "GENERATED", 20)
    monkeypatch.setattr(trial, "GENERATED", 20)
    for cached in (trial.scorer_of, trial.judge_of):
        cached.cache_clear()


@pytest.mark.parametrize("profile", [plan.CPU, plan.QUICK, plan.GPU])
def test_plan_has_each_trial_once_with_all_seeds(profile: plan.Profile) -> None:
    trials = profile.trials()
    assert len({t.key for t in trials}) == len(trials)
    settings = Counter(replace(t, settings=replace(t.settings, seed=0)) for t in trials)
    assert set(settings.values()) == {profile.seeds}
    assert profile is plan.QUICK or profile.seeds >= 5


def test_plan_reaches_every_depth_and_rate() -> None:
    trials = plan.CPU.trials()
    assert {t.settings.network for t in trials} == set(plan.DEPTHS)
    assert {t.settings.data for t in trials} == {"mnist", "emoji", "photos"}
    at_rates = {t.settings.lr_discriminator for t in trials if t.study == "rates"}
    assert at_rates == set(plan.CPU.rates)
    assert {t.settings.critic_steps for t in plan.GPU.trials()} == {1, 5}


@pytest.mark.parametrize(("network", "layers"), list(plan.DEPTHS.items()))
def test_networks_have_the_depths_that_are_told(network: str, layers: int) -> None:
    model = NETWORKS[network][1](3, 32, 1, 2)
    assert len(weight_layers(model)) == layers
    assert model(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)).shape == (2,)


@pytest.mark.parametrize("norm", ["none", "bssn"])
def test_watched_gradients_are_those_of_the_normalised_weights(norm: str, digits: data.Images) -> None:
    run = trial.WatchedRun(replace(SMALL.base, norm=norm), digits, torch.device("cpu"))
    for _ in range(2):
        run.step()
        lengths = run.lengths()
        if norm == "none":
            own = {n: m.weight.grad.norm().item() for n, m in weight_layers(run.discriminator).items()}
            assert lengths == pytest.approx(own, rel=1e-4)
    assert lengths.keys() == weight_layers(run.discriminator).keys()
    assert 0 < run.ratio < 1
    assert run.bound_broken == 0


def test_record_has_scores_and_a_course(few_images: None) -> None:
    record = trial.run_trial(SMALL.trial("variants", plan.Case("bssn", 2.0), 0))
    assert json.loads(json.dumps(record)) == record
    assert record["settings"]["scale"] == 2.0
    assert (record["steps"], record["diverged"], record["course"]["step"]) == (2, False, [1, 2])
    assert set(record["scores"]) == {
        "frechet", "precision", "recall", "density", "coverage", "classifier_frechet"
    }  # fmt: skip
    assert len(record["course"]["slope"]) == 2
    layers = record["initial"].keys()
    assert record["course"]["gradient"].keys() == record["course"]["variance"].keys() == layers
    assert len(record["samples"]) == trial.SHOWN


def test_course_is_recorded_now_and_then_and_at_the_end(digits: data.Images) -> None:
    asked = replace(SMALL.trial("depth", plan.Case("sn"), 0), steps=8, log_every=3, scored=False)
    record = trial.run_trial(asked)
    assert record["course"]["step"] == [1, 4, 7, 8]
    assert "scores" not in record


def test_a_training_that_diverges_ends_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(SMALL.trial("rates", plan.Case("sn"), 0), steps=50, log_every=40, scored=False)
    real_step, done = trial.WatchedRun.step, []

    def step(self: trial.WatchedRun) -> tuple[float, float]:
        losses = real_step(self)
        done.append(losses)
        return (math.nan, 0.0) if len(done) == 5 else losses

    monkeypatch.setattr(trial.WatchedRun, "step", step)
    record = trial.run_trial(asked)
    assert record["diverged"]
    assert record["steps"] == record["course"]["step"][-1] == 5


def test_pool_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = list(SMALL.variants("digits"))[:2]
    for t in trials:
        pool.file_of(tmp_path, t).write_text(json.dumps({"key": t.key}))
    monkeypatch.setattr(pool, "run_trial", None)  # nothing is left to run
    pool.run_all(trials, tmp_path, 1)
    assert [record["key"] for record in pool.read_all(trials, tmp_path)] == [t.key for t in trials]
    assert pool.read_all(list(SMALL.variants("mnist")), tmp_path) == []


@pytest.fixture
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Put eager steps in the place of captured ones, with as many before them; returns how often each was made."""
    captures: list[int] = []

    def capture(step: captured.Callable[[], captured.Losses]) -> captured.Callable[[], captured.Losses]:
        for _ in range(captured.WARM_UP):
            step()
        captures.append(1)
        return step

    monkeypatch.setattr(captured, "capture", capture)
    return captures


def test_captured_steps_are_those_of_a_run(without_graphs: list[int], digits: data.Images) -> None:
    from gan.training import Run

    settings = replace(SMALL.base, norm="bssn", critic_steps=2)
    eager = Run(settings, digits, torch.device("cpu"))
    for _ in range(captured.WARM_UP + 2):
        losses = eager.step()
    torch.manual_seed(settings.seed)
    graph = captured.CapturedRun(settings, digits, torch.device("cpu"))
    assert tuple(loss.item() for loss in graph.advance(2)) == losses
    assert graph.steps_done == eager.steps_done
    for a, b in zip(eager.discriminator.state_dict().values(), graph.discriminator.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert eager.average.n_averaged == captured.WARM_UP + 2


def test_trainings_on_a_gpu_go_on_until_their_time_is_over(
    without_graphs: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [replace(t, steps=6, scored=False) for t in SMALL.variants("digits")][:3]
    now = iter([0.0, 1.0, 2.0, 11.0, 12.0])
    monkeypatch.setattr(captured.time, "perf_counter", lambda: next(now, 100.0))
    assert captured.run_for(trials, tmp_path, 10.0, "", "cpu") == 2
    first = json.loads(pool.file_of(tmp_path, trials[0]).read_text())
    assert (first["steps"], first["diverged"]) == (6, False)
    assert first["course"]["gradient"] == {}
    monkeypatch.undo()
    monkeypatch.setattr(captured, "capture", lambda step: step)
    assert captured.run_for(trials, tmp_path, 600.0, "", "cpu") == 0  # goes on with what is missing
    assert json.loads(pool.file_of(tmp_path, trials[0]).read_text()) == first
    assert "2 of 2" in capsys.readouterr().out
    assert captured.run_for(trials, tmp_path, 600.0, "", "cpu") == 0
