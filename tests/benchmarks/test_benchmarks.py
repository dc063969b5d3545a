"""The benchmarks run, check what they time, and make their report: on small layers, without looking at a clock."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compare, gan, layer_sets, measure, networks, peers, plots, tables, targets
from benchmarks.measure import BOTH, Record
from benchmarks.problem import VARIANTS, Problem, WrongResultError
from benchmarks.results import Results, load

ROOT = Path(__file__).parents[2]
QUICK_PEERS = [name for name in peers.names() if name not in peers.COMPILED]


def test_the_suite_runs():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "--benchmark-disable", "-q", "--device", "cpu"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


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
                        "v": peer._rival.vectors()[2][1],
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
    assert [(r.variant, r.peer) for r in records] == list(gan.CASES)
    assert records[0].added == 0
    with pytest.raises(WrongResultError, match="differ"):
        gan._check_equal("x", torch.ones(3), torch.tensor([1, 1, 1.01]))


def invented(time_of_ours: float = 1.0) -> Results:
    """Results in which torch takes 4 ms, the reference 12 and ours 1 (or as told) on sets of 1 MB and 100 MB."""
    times = {"copy": 0.5, "torch": 4.0, "torch.compile": 3.5, "reference": 12.0, "bssn_fast cpu": time_of_ours}
    results = Results(
        {"device": "Some CPU", "threads": 2, "torch": "2", "python": "3", "bssn_fast": "0", "cache": 1 << 25}
    )
    for variant in VARIANTS:
        for part, name, megabytes in (("layers", "a", 1.0), ("layers", "b", 100.0), ("linear", "linear-20x4", 0.1)):
            for peer, median in times.items():
                for phase in ("forward", "backward", BOTH):
                    copies = median / times["copy"]
                    r = Record(part, name, variant, peer, phase, 2, megabytes, median=median, copies=copies, runs=9)
                    results.records.append(r)
    for variant, peer in gan.CASES:
        results.records.append(Record("gan", "cnn", variant, peer, "step", 2, 0, median=10.0, runs=9, added=0.0))
    return results


def test_targets():
    found = {t.what: (t.found, t.holds) for t in targets.targets(invented())}
    assert found["`bssn` forward, times as fast as reference, geometric mean"] == ("12.0", True)
    assert found["`sn` forward, times as fast as torch, geometric mean"] == ("4.0", False)
    assert found["`bssn` forward in plain copies, b"] == ("2.00", False)
    assert "`bssn` forward in plain copies, a" not in found  # it fits into the cache
    assert found["host overhead: 20 layers of 4×4 weights, `sn` forward, part of torch's time"] == ("1/4.0", False)
    assert all(t.holds for t in targets.targets(invented(0.3)))


def test_report_round_trip(tmp_path):
    results = invented()
    results.save(tmp_path)
    assert load(tmp_path) == results
    assert (tmp_path / "results.csv").read_text().count("\n") == len(results.records) + 1
    assert {p.name for p in plots.save(results, tmp_path)} == {"speedup.png", "copies.png", "grid.png", "gan.png"}

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin results: cpu -->\nold\n<!-- end results: cpu -->\nafter\n")
    for _ in range(2):
        tables.renew(results, "cpu", page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("-->\nafter\n")
    assert "\nold\n" not in text
    assert "| a | 2 | 1.0 | 0.5 | 1 (2.0 copies) | 4 (4.0) | 3.5 (3.5) | 12 (12.0) |" in text
    with pytest.raises(ValueError, match="begin results: cuda"):
        tables.renew(results, "cuda", page)


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
