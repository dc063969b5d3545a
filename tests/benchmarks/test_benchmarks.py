"""The benchmarks run, check what they time, and make their report: on small layers, without looking at a clock."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.against import peers
from benchmarks.shown import compare, front, page, plots, tables, targets
from benchmarks.shown.results import Results, everything, load
from benchmarks.timing import machine, measure
from benchmarks.timing.clock import CpuClock
from benchmarks.timing.record import BOTH, MOVED, Record, median_interval
from benchmarks.work import devices, layer_sets, networks, training_step
from benchmarks.work.problem import VARIANTS, Problem, WrongResultError

ROOT = Path(__file__).parents[2]
QUICK_PEERS = [name for name in peers.names() if name not in peers.COMPILED]


def run_the_suite(*options: object) -> str:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "-q", "--device", "cpu", *map(str, options)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_suite_runs():
    run_the_suite("--benchmark-disable")


def test_the_suite_keeps_what_the_report_keeps(tmp_path):
    file = tmp_path / "benchmark.json"
    out = run_the_suite("-k", "tiny-sn-torch or tiny-sn-copy", "--benchmark-json", file, "--report-to", tmp_path)
    assert "as fast as torch, every model: aimed at ≥ 3" in out
    kept = load(tmp_path)
    assert {(r.peer, r.phase) for r in kept.records} == {
        ("torch", "forward"), ("torch", "backward"), ("torch", BOTH), ("copy", "forward"),
    }  # fmt: skip
    assert (tmp_path / "report.md").exists()
    notes = {b["group"]: b["extra_info"] for b in json.loads(file.read_text())["benchmarks"]}
    found = notes["tiny, sn, backward, hot"]
    record = kept.find("layers", "tiny", "sn", "torch", "backward")
    assert found["bytes_moved"] == 3 * 4 * layer_sets.tiny().weights
    assert found["median"] == record.median
    assert found["gb_s"] == pytest.approx(found["bytes_moved"] / 1e6 / record.median, rel=1e-3)
    assert found["percent_of_copy"] == pytest.approx(100 * 1.5 / record.copies, rel=1e-3)
    assert found["percent_of_vendor_peak"] is None
    assert found["threads"] == 1


@pytest.mark.parametrize("chosen", [*layer_sets.load().values(), layer_sets.tiny()], ids=lambda s: s.name)
def test_layers_have_the_shapes_listed(chosen):
    weights = layer_sets.Weights(chosen, "meta")()
    assert [tuple(w.shape) for w in weights] == [layer.shape for layer in chosen.layers]
    assert sum(w.numel() for w in weights) == chosen.weights


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (networks.CnnDiscriminator, "bsn_cnn_d32"),
        (networks.ResidualDiscriminator, "sngan_d32"),
        (networks.Generator, "dcgan_g32"),
    ],
)
def test_networks_have_the_layers_of_a_set(network, name):
    with torch.device("meta"):
        found = [tuple(layer.weight.shape) for layer in networks.weight_layers(network())]
    assert sorted(found) == sorted(layer.shape for layer in layer_sets.load()[name].layers)


@pytest.mark.parametrize("variant", VARIANTS)
def test_peers_agree_and_are_timed(variant):
    records = measure.layer_set("layers", layer_sets.tiny(), variant, QUICK_PEERS, seconds=1e-9)
    assert {r.error for r in records} == {None}
    assert {(r.peer, r.phase) for r in records} == {(peers.COPY, "forward")} | {
        (name, phase) for name in QUICK_PEERS if name != peers.COPY for phase in ("forward", "backward", BOTH)
    }
    assert all(r.median > 0 and r.copies > 0 and r.runs >= measure.FEWEST_ROUNDS for r in records)
    assert all(r.low <= r.median <= r.high and r.prepare_seconds > 0 for r in records)


def test_peers_are_made_once_for_hot_and_cold_caches(monkeypatch):
    made = []
    prepare = measure.prepare
    monkeypatch.setattr(measure, "prepare", lambda name, problem, **how: made.append(name) or prepare(name, problem))
    monkeypatch.setattr(CpuClock, "cold_bytes", 4096)
    names = [peers.COPY, "bssn_fast cpu"]
    records = measure.layer_set("layers", layer_sets.tiny(), "sn", names, seconds=1e-9, caches=("hot", "cold"))
    assert made == names
    assert [r.caches for r in records] == ["hot"] * 4 + ["cold"] * 4


def test_every_peer_is_in_each_part():
    few, many = layer_sets.square("linear", 20, 4), layer_sets.square("linear", 100, 4)
    assert measure.peers_for("layers", many, "cpu") == measure.peers_for("linear", few, "cpu") == peers.names("cpu")
    assert set(peers.names("cpu")) - set(measure.peers_for("linear", many, "cpu")) == {peers.COMPILE}
    assert {*peers.COMPILED, "torch graph"} <= set(peers.names("cuda"))


def test_a_peer_that_fails_is_reported(monkeypatch, tmp_path):
    def fail(problem, mode):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(peers.in_torch, "torch_compiled", fail)
    names = [peers.COPY, peers.COMPILE]
    records = measure.layer_set("layers", layer_sets.tiny(), "sn", names, seconds=1e-9)
    assert [r.error for r in records if r.peer == peers.COMPILE] == ["RuntimeError: no compiler"]
    assert "| torch.compile | RuntimeError: no compiler |" in tables.render(Results(machine.describe(), records))


@pytest.mark.parametrize("what", ["weight", "gradient", "v"])
def test_a_wrong_result_is_not_timed(monkeypatch, what):
    right = peers.make

    def wrong(name: str, problem: Problem) -> peers.Peer:
        peer = right(name, problem)
        if name == "foreach":
            run = peer.first_run

            def first_run() -> None:
                run()
                with torch.no_grad():
                    changed = {
                        "weight": peer.outputs[0],
                        "gradient": (peer.gradients or [None])[-1],
                        "v": peer._normalisation.vectors()[2][1],
                    }[what]
                    changed.mul_(1.0001)

            peer.first_run = first_run
        return peer

    monkeypatch.setattr(peers, "make", wrong)
    records = measure.layer_set("layers", layer_sets.tiny(), "bssn", ["copy", "foreach"], seconds=1e-9)
    failed = [r for r in records if r.peer == "foreach"]
    assert [r.median for r in failed] == [None]
    assert f"{what} of layer" in failed[0].error


def test_gan_steps_are_timed_with_and_without_normalisation():
    records = measure.gan_steps("cnn", batch=2, seconds=1e-9, width=4)
    assert [(r.variant, r.peer) for r in records] == list(training_step.CASES)
    assert records[0].added == 0
    with pytest.raises(WrongResultError, match="differ"):
        training_step._check_equal("x", torch.ones(3), torch.tensor([1, 1, 1.01]))
    with pytest.raises(WrongResultError, match="differ"):
        training_step._check_equal("x", torch.ones(3), torch.tensor([1, 1, 1.0001]))


def test_gradients_may_differ_on_a_gpu(monkeypatch):
    """Where an activation next to zero is on its other side. Scores may not."""
    monkeypatch.setattr(devices, "pretended", True)
    a, b = torch.ones(1000), torch.ones(1000)
    b[0] += 0.03  # by 1e-3
    training_step._check_equal("weight", a, b)
    with pytest.raises(WrongResultError, match="scores differ"):
        training_step._check_equal("cnn, sn: scores", a, b)


def invented(time_of_ours: float = 1.0, device: str = "Some CPU") -> Results:
    """Results in which torch takes 4 ms, the reference 12 and ours 1 (or as told) on sets of 1 MB and 100 MB."""
    times = {"copy": 0.5, "torch": 4.0, "torch.compile": 3.5, "reference": 12.0, "bssn_fast cpu": time_of_ours}
    results = Results({"device": device, "threads": 2, "torch": "2", "python": "3", "bssn_fast": "0", "cache": 1 << 25})
    for variant in VARIANTS:
        for part, name, megabytes in (("layers", "a", 1.0), ("layers", "b", 100.0), ("linear", "linear-20x4", 0.1)):
            for peer, median in times.items():
                for phase in MOVED:
                    r = Record(part, name, variant, peer, phase, 2, megabytes, copies=median / times["copy"])
                    r.fill([median / 1e3] * 9)
                    r.low, r.high = 0.9 * median, 1.1 * median
                    results.records.append(r)
    for variant, peer in training_step.CASES:
        step = Record("gan", "cnn", variant, peer, "step", 2, 0, median=10.0, runs=9, added=0.0)
        results.records.append(step)
    return results


def test_targets():
    found = {t.what: (t.found, t.holds) for t in targets.targets(invented())}
    assert found["`bssn` forward, times as fast as reference, geometric mean"] == ("12.0; a plain copy 24.0", True)
    assert found["`sn` forward, times as fast as torch, geometric mean"] == ("4.0; a plain copy 8.0", False)
    assert found["`sn` forward + backward, times as fast as torch.compile, geometric mean"] == ("3.5", True)
    copies = "`bssn` forward in plain copies, {}, beyond the last-level cache"
    assert found[copies.format("b")] == ("2.00", False)
    assert copies.format("a") not in found  # it fits into the cache
    assert found["host overhead: 20 layers of 4×4 weights, `sn` forward, part of torch's time"] == ("1/4.0", False)
    assert all(t.holds for t in targets.targets(invented(0.3)))


def test_what_was_not_measured_does_not_hold():
    results = invented(0.3)
    results.records = [r for r in results.records if not (r.peer == "torch.compile" and r.set == "a")]
    found = {t.what: (t.found, t.holds) for t in targets.targets(results)}
    compiled = "`sn` forward + backward, times as fast as torch.compile, geometric mean"
    assert found[compiled] == ("11.7; 1 of 2 models", False)
    assert not any(t.holds for t in targets.targets(Results(results.machine)))


@pytest.mark.parametrize(
    ("time_of_ours", "holds", "text"),
    [
        (1.0, True, "0 of 54 (0 too close to tell)"),
        (3.6, True, "0 of 54 (36 too close to tell)"),  # torch and torch.compile: 4 and 3.5
        (5.0, False, "36 of 54 (0 too close to tell); worst 0.70 times as fast as torch.compile on a, `sn` forward"),
    ],
)
def test_noise_does_not_decide_who_is_slower(time_of_ours, holds, text):
    found = targets.never_slower(invented(time_of_ours))
    assert (found.found, found.holds) == (text, holds)


def test_interval_of_the_median():
    assert median_interval([3.0]) == (3, 3)
    assert median_interval([5.0, 1, 2, 4, 3]) == (1, 5)
    assert median_interval(range(100)) == (39, 60)  # the 40th and the 61st, by the binomial distribution


def test_report_round_trip(tmp_path):
    results = invented()
    results.save(tmp_path)
    found = load(tmp_path)
    assert found.machine == results.machine
    assert [r.to_dict() for r in found.records] == [r.to_dict() for r in results.records]
    assert (tmp_path / "results.csv").read_text().count("\n") == len(results.records) + 1
    pictures = plots.save(results, tmp_path)
    assert [p.stem for p in pictures] == list(plots.NAMES)
    text = tables.render(results, pictures)
    assert "| a | 2 | 1.0 | 0.5 (4 GB/s) | 1 [1, 1] (2.0 copies) | 4 (4.0) | 3.5 (3.5) | 12 (12.0) |" in text
    assert "![gan](gan.png)" in text
    assert "## Whole training steps (added: median)\n" in text
    for r in results.records:
        r.added_low, r.added_high = -1.0, 1.0
    assert "## Whole training steps (added: median and its 95 % interval)\n" in tables.render(results)


def test_captured_steps_have_their_makers_colours():
    results = invented()
    for peer in ("torch graph", "bssn_fast graph"):
        step = Record("gan", "cnn", "sn", peer, "step", 2, 0, median=10.0, runs=9, added=5.0)
        results.records.append(step)
    bars = plots.gan_steps(results).axes[0].containers
    colours = {bar.get_label(): (bar.patches[0].get_facecolor(), bar.patches[0].get_hatch()) for bar in bars}
    for peer in ("torch", "bssn_fast"):
        eager, captured = colours[f"sn, {peer}"], colours[f"sn, {peer} graph"]
        assert eager[0] == captured[0]
        assert (eager[1], captured[1]) == (None, "//")


def test_the_page_shows_all_machines(tmp_path):
    for device, median in (("AMD EPYC", 1.0), ("Some CPU", 0.3)):
        found = invented(median, device)
        found.save(tmp_path / "results" / machine.key(found.machine))
    gpu = invented(device="Some GPU")
    gpu.machine["cuda"] = "13"
    gpu.save(tmp_path / "results" / machine.key(gpu.machine))
    (tmp_path / "docs").mkdir()
    path = tmp_path / "docs" / "performance.md"
    path.write_text("before\n<!-- begin results: cpu -->\nold\n<!-- end results: cpu -->\nafter\n")
    for _ in range(2):
        page.renew("cpu", tmp_path / "docs", tmp_path / "results")
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("-->\nafter\n")
    assert "\nold\n" not in text
    assert "Some GPU" not in text
    assert "|  | aimed at | AMD EPYC, 2 threads, torch 2 | Some CPU, 2 threads, torch 2 |" in text
    row = "| `sn` forward, times as fast as torch, geometric mean | ≥ 5 | "
    assert f"{row}**4.0; a plain copy 8.0** | 13.3; a plain copy 8.0 |" in text
    assert "[All tables](../results/amd-epyc-2-threads/torch-2/report.md)" in text
    with pytest.raises(ValueError, match="begin results: cuda"):
        page.renew("cuda", tmp_path / "docs", tmp_path / "results")


def test_the_readme_shows_what_was_measured(tmp_path):
    (tmp_path / "docs" / "images").mkdir(parents=True)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- begin results: front -->\nold\n<!-- end results: front -->\nafter\n")
    front.renew(invented(), tmp_path)
    assert (tmp_path / front.CHART).stat().st_size > 10_000
    text = " ".join(readme.read_text().split())
    assert "the layers of 2 published models, `sn` is 4.0 times as fast" in text
    assert "alone is 4.0 to 4.0 times as fast, 4.0 in the mean; a plain copy of the weights" in text
    assert "would be 8.0 times as fast." in text
    assert text.startswith("before <!-- begin")


def test_the_committed_readme_is_that_of_the_kept_results():
    kept = next(found for found in everything() if found.kind == "cpu" and found.sets("gan"))
    assert front.sentence(kept) in (ROOT / "README.md").read_text()


def test_tables_of_a_gpu():
    about = {"device": "NVIDIA H200", "cuda": "13", "torch": "2", "python": "3", "bssn_fast": "0", "peak_gb_s": 4800}
    results = Results(about)
    for caches, median in (("hot", 0.02), ("cold", 0.05)):
        r = Record("layers", "a", "sn", "bssn_fast triton", "forward", 2, 48.0, caches, copies=1.5)
        r.fill([median / 1e3], [30e-6])
        r.launches = 1
        results.records.append(r)
    text = tables.render(results)
    assert "| a | float32 | bssn_fast triton | 20 | 50 | 30 | 1 | 1.50 | 1920 | 40 % |" in text
    assert machine.key(about) == "nvidia-h200/torch-2"
    assert targets.targets(results) == []


def measured_by_the_command(monkeypatch, *words: str) -> int:
    """`python -m benchmarks.report` where each part is one small set."""
    monkeypatch.setattr(layer_sets, "load", lambda: {"tiny": layer_sets.tiny()})
    monkeypatch.setattr(layer_sets, "grid", lambda kind: [layer_sets.square(kind, 20, 4)])
    monkeypatch.setattr(measure, "gan_steps", partial(measure.gan_steps, width=4))
    monkeypatch.setattr(machine, "pin_threads", lambda threads: None)
    return report.main([*words, "--seconds", "1e-9", "--without", peers.COMPILE, "--batch", "1"])


def test_the_command(monkeypatch, tmp_path, capsys):
    assert measured_by_the_command(monkeypatch, "--output", str(tmp_path)) == 0
    found = load(tmp_path)
    assert {r.part for r in found.records} == set(report.PARTS)
    assert {p.name for p in tmp_path.iterdir()} == {
        "results.json", "results.csv", "report.md", *(f"{name}.png" for name in plots.NAMES),
    }  # fmt: skip
    again = ("--output", str(tmp_path), "--parts", "layers", "--variants", "sn", "--compare")
    assert measured_by_the_command(monkeypatch, *again) in (0, 1)  # noise decides: nothing is written
    assert load(tmp_path) == found
    assert report.main(["--render-only", "--output", str(tmp_path)]) == 0
    assert "times the time of before" in capsys.readouterr().out


def test_nothing_to_compare_with(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(machine, "pin_threads", lambda threads: None)
    monkeypatch.setattr(measure, "layer_set", None)  # nothing is measured
    assert report.main(["--compare", "--output", str(tmp_path / "none")]) == 2
    assert re.search(r"no results of this machine.*make bench.*AMD EPYC", capsys.readouterr().out, re.S)


def test_measuring_a_part_again_replaces_that_part():
    results = invented()
    again = dataclasses.replace(results.find("layers", "a", "sn", "torch", "forward"), median=7.0)
    count = len(results.records)
    results.merge([again])
    assert results.find("layers", "a", "sn", "torch", "forward").median == 7.0
    assert results.find("layers", "a", "sn", "torch", "backward") is None  # of another run than the new forward
    assert len(results.records) == count - 2


def test_comparison_finds_what_became_slower(capsys):
    assert compare.print_comparison(invented(), invented(1.05)) == 0
    assert compare.print_comparison(invented(), invented(1.5)) == 1
    assert "slower: a sn forward bssn_fast cpu: 1.50 times" in capsys.readouterr().out


def test_a_slower_machine_is_not_a_regression():
    slow = invented()
    for r in slow.records:
        r.median *= 2
    assert max(compare.ratios(invented(), slow).values()) == pytest.approx(1)


def test_a_change_within_the_timers_noise_is_no_regression_on_a_faster_machine():
    """Ours from 0.030 to 0.022 ms is faster, though torch gained more."""
    kept, found = invented(), invented()
    for results, mine, torchs in ((kept, 0.030, 0.100), (found, 0.022, 0.070)):
        for r in results.records:
            r.median = mine if r.peer == "bssn_fast cpu" else torchs
    assert set(compare.ratios(kept, found).values()) == {1.0}
