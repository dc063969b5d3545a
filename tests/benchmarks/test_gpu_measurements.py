"""All that is timed on a GPU, on a CPU that passes for one: tiny layers, each way and peer, to the tables and pages."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from functools import partial
from types import SimpleNamespace

import pretended_gpu
import pytest
import torch

from benchmarks.against import peers
from benchmarks.gpu import compile_once, compile_peers, files, measurements, outcomes, profiled, timetable
from benchmarks.gpu.measurements import Unit
from benchmarks.shown import page, plots, results
from benchmarks.timing import gpu_plan, machine, measure
from benchmarks.timing.record import BOTH, Record
from benchmarks.work import layer_sets
from benchmarks.work.problem import Problem

KEY = machine.key(pretended_gpu.ABOUT)
WAYS = ["bssn_fast cpu", "bssn_fast cpu phases", "bssn_fast cpu graph"]


@pytest.fixture(autouse=True)
def sound(monkeypatch):
    """A GPU that answers."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)


@pytest.fixture
def tiny(monkeypatch):
    """Every unit, of tiny layers and networks."""
    pretended_gpu.install(monkeypatch)
    monkeypatch.setattr(gpu_plan, "SETS", ("tiny",))
    monkeypatch.setattr(gpu_plan, "MANY", (2,))
    monkeypatch.setattr(measurements, "sets", lambda: {"tiny": layer_sets.tiny()})
    return measurements.units("cpu", 1e-9, width=4, batch=1)


def test_everything_is_timed_and_shown(tiny, tmp_path):
    file = tmp_path / "results" / KEY / outcomes.FILE
    outcomes.append(file, "run", machine=KEY, about=pretended_gpu.ABOUT)
    assert measurements.run(tiny, file.parent, KEY, longest=600) == 0
    lines = list(outcomes.read(file))
    assert list(outcomes.measured(lines, KEY)) == [unit.name for unit in tiny]
    files.write_results(file.parent, lines, KEY)
    found = results.load(file.parent)
    assert not [r for r in found.records if r.error]
    cases = {(r.part, r.variant, r.dtype, r.caches, r.peer, r.phase) for r in found.records}
    timed = ["torch", "foreach", "reference", "torch graph", *WAYS]
    for variant in gpu_plan.VARIANTS:
        for phase in ("forward", "backward", BOTH):
            for dtype in gpu_plan.DTYPES:
                for caches in gpu_plan.CACHES:
                    assert {("layers", variant, dtype, caches, peer, phase) for peer in timed} <= cases
            assert {("host", variant, "float32", "hot", peer, phase) for peer in timed} <= cases
        for peer in ("torch", "bssn_fast", "torch graph", "bssn_fast graph"):
            assert ("gan", variant, "float32", "hot", peer, "step") in cases
    assert {("gan", "none", "float32", "hot", peer, "step") for peer in ("none", "graph")} <= cases
    assert all(r.host and r.peak_megabytes == 2.0 for r in found.records if r.peer != peers.COPY)
    assert all(r.launches for r in found.records if r.part == "host")

    tables = (file.parent / files.REPORT).read_text()
    assert "| set | weights | caches | MB | copy | cpu | cpu phases |" in tables
    assert {path.stem for path in plots.save(found, file.parent)} == {"speedup", "copies", "gan"}
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, parts in ((page.PAGE, ["results: cuda"]), (page.KERNELS, ["results: kernels", "awaiting measurement"])):
        (docs / name).write_text("".join(f"<!-- begin {part} -->\n<!-- end {part} -->\n" for part in parts))
    page.renew("cuda", docs, tmp_path / "results")
    shown, kernels = ((docs / name).read_text() for name in (page.PAGE, page.KERNELS))
    assert "### Host time in microseconds" in shown
    assert "bssn_fast graph | " in shown
    assert "NVIDIA H200, torch 2.11.0" in kernels
    assert "| tiny | bfloat16 | cold |" in kernels
    left = kernels.split("awaiting measurement -->")[1]
    assert "torch.compile" in left
    assert "host time" not in left


def test_units_come_in_the_order_of_interest():
    names = [unit.name for unit in measurements.units()]
    assert len(set(names)) == len(names) == 4 * len(gpu_plan.SETS) + 4 * len(gpu_plan.MANY) + 2 + 2
    assert names[:2] == ["layers sngan_d32 bssn float32", "layers sngan_d32 sn float32"]
    assert names[-7:-5] == ["layers dcgan_g32 sn bfloat16", "launches sngan_d32 bssn"]  # the profiler disturbs others
    assert len(measurements.compiled_units()) == 2 * len(gpu_plan.SETS)


def test_plans_are_timed_for_the_sets_that_they_are_for(monkeypatch):
    monkeypatch.setattr(peers.backends, "why_unavailable", lambda name, device: None)
    peer = "bssn_fast triton registers"
    found = {unit.name for unit in measurements.units() if peer in unit.peers}
    layers = [f"layers {name} {variant} {t}" for name in gpu_plan.SETS[:2] for variant in ("bssn", "sn")
              for t in ("float32", "bfloat16")]  # fmt: skip
    assert found == {*layers, "launches sngan_d32 bssn", "launches sngan_d32 sn"}


def test_a_plan_is_switched_on_for_its_peer_alone(monkeypatch):
    seen = []
    monkeypatch.setitem(peers.PLANS, "cpu", ("registers",))
    for stage in ("forward", "backward"):
        monkeypatch.setattr(peers.Peer, stage, lambda peer: seen.append(os.environ.get("BSSN_FAST_CPU_PLAN")))
    given = Problem(layer_sets.tiny(), "sn")
    peer = peers.make("bssn_fast cpu registers", given)
    peer.forward()
    peer.backward()
    assert seen == ["registers"] * 2
    assert "BSSN_FAST_CPU_PLAN" not in os.environ


def test_all_that_is_timed_is_compiled_before(monkeypatch, tmp_path):
    """Each unit of layer sets by one of the steps beside the tests, if it has not been timed."""
    compiled = []
    monkeypatch.setattr(compile_peers, "compile_peers", lambda unit, known: compiled.append(unit.name) or True)
    monkeypatch.setattr(compile_once, "install", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    units = [unit.name for unit in (*measurements.units(), *measurements.compiled_units()) if unit.problem is not None]
    assert len(units) == 6 * len(gpu_plan.SETS) + 2 * len(gpu_plan.MANY)
    sources = outcomes.sources(KEY, *outcomes.TIMING)
    outcomes.append(tmp_path / outcomes.FILE, "unit", name=units[0], sources=sources, records=[])
    for step in timetable.compilers(timetable.Files(tmp_path, tmp_path, KEY), 60):
        assert compile_peers.main(step.command[3:]) == 0
    assert sorted(compiled) == sorted(units[1:])


def test_only_peers_that_compile_run_before(monkeypatch, capsys):
    """In the caches that the timing looks into; and one that fails is left to the timing."""
    ran = []

    def prepare(name, problem, *, empty_cache):
        assert not empty_cache
        ran.append(name)
        if name == "bssn_fast triton":
            raise RuntimeError("no assembler")
        return SimpleNamespace(prepare_seconds=3.0)

    monkeypatch.setattr(measure, "prepare", prepare)
    names = ["copy", "torch", *peers.COMPILED, "bssn_fast cuda", "bssn_fast triton", "bssn_fast triton phases"]
    unit = Unit("layers a", records, names, lambda: None)
    assert compile_peers.compile_peers(unit)
    assert not ran
    assert not compile_peers.compile_peers(dataclasses.replace(unit, problem=object))
    assert ran == [*peers.COMPILED, "bssn_fast triton", "bssn_fast triton phases"]
    assert "layers a, bssn_fast triton: RuntimeError: no assembler" in capsys.readouterr().out


def test_what_the_profiler_looks_at(monkeypatch):
    """One forward and one backward between its beginning and its end."""
    seen = []
    for stage in ("forward", "backward"):
        run = getattr(peers.Peer, stage)
        monkeypatch.setattr(peers.Peer, stage, lambda peer, stage=stage, run=run: (seen.append(stage), run(peer)))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: seen.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: seen.append("stop"))
    profiled.main("sngan_d32", "cpu")
    assert seen == ["forward", "backward", "start", "forward", "backward", "stop"]


@pytest.mark.parametrize("name", ["torch.compile", "torch.compile reduce-overhead"])
def test_compiled_peers(tiny, monkeypatch, name):
    compiled = torch.compile

    def traced(function=None, *, mode=None, **options):
        """What is traced is checked; compiling it would take most of a minute."""
        return compiled(function, **(options | {"backend": "aot_eager"}))

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(peers, "COMPILED", (name,))
    unit = measurements.compiled_units("cpu", 1e-9)[0]
    assert unit.name == "compiled tiny sn"
    records = unit.records([])
    assert {r["error"] for r in records} == {None}
    assert {r["peer"] for r in records} == {peers.COPY, name, WAYS[0]}


def test_the_page_lists_what_awaits_measurement():
    """As the kept results have it: `python -m benchmarks.report --render-only` writes it."""
    kept = [found for found in results.everything() if found.kind == "cuda"]
    assert page.awaiting(kept) in (page.DOCS / page.KERNELS).read_text()


def records(names) -> list:
    return []


def test_a_second_process_goes_on(tmp_path):
    done = []
    units = [Unit(name, lambda names, name=name: done.append(name) or []) for name in "abc"]
    file = tmp_path / outcomes.FILE
    outcomes.append(file, "run", machine=KEY, about={})
    assert measurements.run(units[:1], tmp_path, KEY, 60) == 0
    outcomes.append(file, "begun", name="b")  # and its process died
    assert measurements.run(units, tmp_path, KEY, 60) == measurements.FINISHED
    assert done == ["a", "c"]
    outcomes.append(file, "run", machine=KEY, about={})
    assert measurements.run(units, tmp_path, KEY, 60) == 0
    assert done == ["a", "c", "b"]


def test_what_no_earlier_run_came_to_is_first(tmp_path):
    """Though all has changed since: or each run would end before the same units. What counts launches stays last."""
    order = []

    def unit(name):
        return Unit(name, lambda names: order.append(name) or [])

    names = ["a", "b", "c", "d"]
    units = [*map(unit, names), unit("launches a"), unit("launches b")]
    file = tmp_path / outcomes.FILE
    for name in ("a", "c", "launches a"):
        outcomes.append(file, "unit", name=name, records=[], sources="others", sources_of_others="others")
    outcomes.append(file, "unit", name="d", error="it failed", sources="others", sources_of_others="others")
    outcomes.append(file, "run", machine=KEY, about={})
    assert measurements.run(units, tmp_path, KEY, 60) == 0
    assert order == ["b", "d", "a", "c", "launches a", "launches b"]


def test_ways_that_ended_a_process_are_not_timed(tmp_path, monkeypatch):
    """Or they would end that of each unit, with the figures of all others."""
    monkeypatch.setattr(outcomes, "sources_of_test", lambda name, machine: "now")
    timed = []
    names = ["copy", "torch graph", "bssn_fast cuda", "bssn_fast cuda graph", "bssn_fast cuda clusters",
             "bssn_fast cuda keep", "bssn_fast triton registers", "bssn_fast triton"]  # fmt: skip
    file = tmp_path / outcomes.FILE
    for name, why, sources in (
        ("tests/gpu/test_a.py::test[cuda-single]", "worker 'gw0' crashed while running 'test[cuda-single]'", "now"),
        ("tests/gpu/test_a.py::test[cuda-keep-1]", "worker 'gw1' crashed while running 'test[cuda-keep-1]'", "now"),
        ("tests/gpu/test_a.py::test[triton-registers]", "torch.AcceleratorError: CUDA error: misaligned", "now"),
        ("tests/gpu/test_b.py::test[cuda-clusters]", "AssertionError: error 1.3e-6", "now"),
        ("tests/gpu/test_c.py::test[cuda-clusters]", "worker 'gw1' crashed while running 'x'", "before"),
    ):
        outcomes.append(file, "test", name=name, outcome="failed", why=why, sources=sources)
    outcomes.append(file, "run", machine=KEY, about={})
    assert measurements.run([Unit("a", lambda names: timed.extend(names) or [], names)], tmp_path, KEY, 60) == 0
    assert timed == [name for name in names if name not in ("bssn_fast cuda keep", "bssn_fast triton registers")]


def test_other_peers_are_not_timed_again_for_ours(tmp_path, monkeypatch):
    """Where only the package has changed; a training step, whose peers are compared turn by turn, is timed whole."""
    timed = []

    def run(names, unit):
        timed.append((unit, list(names)))
        return [Record("layers", unit, "sn", peer, "forward", 1, 1.0) for peer in names]

    names = ["copy", "torch", "torch.compile", "bssn_fast cuda"]
    units = [
        Unit("layers a", partial(run, unit="layers"), names),
        Unit("compiled a", partial(run, unit="compiled"), [names[0], *names[2:]], for_others=True),
        Unit("training step", partial(run, unit="training")),
    ]
    file = tmp_path / outcomes.FILE
    outcomes.append(file, "run", machine=KEY, about={})
    assert measurements.run(units, tmp_path, KEY, 60) == 0
    timed.clear()
    monkeypatch.setattr(outcomes, "sources", lambda machine, *patterns: "kernels changed")
    outcomes.append(file, "run", machine=KEY, about={})
    assert measurements.run(units, tmp_path, KEY, 60) == 0
    assert timed == [("layers", ["copy", "bssn_fast cuda"]), ("training", [])]
    found = outcomes.measured(outcomes.read(file), KEY)
    assert {record["peer"] for record in found["layers a"]["records"]} == set(names)
    assert {record["peer"] for record in found["compiled a"]["records"]} == {"torch.compile"}
    timed.clear()
    monkeypatch.setattr(outcomes, "sources", lambda machine, *patterns: "benchmarks changed")
    monkeypatch.setattr(outcomes, "hash_of", lambda machine, *patterns: "benchmarks changed")
    outcomes.append(file, "run", machine=KEY, about={})
    measurements.run(units, tmp_path, KEY, 60)
    assert timed[0] == ("layers", names)


def test_a_unit_that_fails_is_told_and_the_next_one_runs(tmp_path):
    def fail(names):
        raise RuntimeError("out of memory\nmore")

    outcomes.append(tmp_path / outcomes.FILE, "run", machine=KEY, about={})
    assert measurements.run([Unit("a", fail), Unit("b", records)], tmp_path, KEY, 60) == measurements.FINISHED
    lines = list(outcomes.read(tmp_path / outcomes.FILE))
    assert list(outcomes.measured(lines, KEY)) == ["b"]
    assert "unit a failed: RuntimeError: out of memory" in files.summary(lines, KEY)


def test_a_spoiled_gpu_ends_the_process(tmp_path, monkeypatch):
    def spoiled():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", spoiled)
    assert measurements.run([Unit("a", records), Unit("b", records)], tmp_path, KEY, 60) == 1
    assert list(outcomes.measured(outcomes.read(tmp_path / outcomes.FILE), KEY)) == ["a"]


def test_one_of_a_kind_is_compiled_at_a_time(tmp_path):
    """Two threads that want the same kernel, as two processes would."""
    inside, compiled = threading.Semaphore(1), []

    class Source:
        def hash(self):
            return "x"

    def compile_kernel(src, target=None, options=None, **others):
        assert inside.acquire(blocking=False), "two at once"
        time.sleep(0.05)
        compiled.append((src, target, options))
        inside.release()

    once = compile_once.once(compile_kernel, tmp_path / "locks")
    source = Source()
    threads = [threading.Thread(target=once, args=(source, "sm_90", {"num_warps": 8})) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 3
