"""The peers that torch.compile makes, with a compiler that takes no time."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.against import peers
from benchmarks.timing import measure
from benchmarks.work import layer_sets
from benchmarks.work.problem import VARIANTS, Problem


@pytest.mark.parametrize("name", peers.COMPILED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_peers_agree(monkeypatch, variant, name):
    compiled = torch.compile

    def traced(function=None, *, mode=None, **options):
        """What is traced is checked; compiling it would take most of a minute."""
        return compiled(function, **(options | {"backend": "aot_eager"}))

    monkeypatch.setattr(torch, "compile", traced)
    peer = measure.prepare(name, Problem(layer_sets.tiny(), variant))
    peer.forward()
    peer.backward()
    assert len(peer.gradients) == len(layer_sets.tiny().layers)


def test_what_one_mode_has_compiled_outlasts_the_other(monkeypatch):
    """Both of a problem take turns; and each replay of a CUDA graph is told that the last one's results are no more."""
    compiled, graphs, steps = torch.compile, [], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function=None, *, mode=None, **o: compiled(function, backend=count))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(True))
    problem = Problem(layer_sets.tiny(), "sn")
    first = peers.make(peers.COMPILE, problem)
    first.forward()
    second = peers.make(peers.REDUCE_OVERHEAD, problem)
    for peer in (second, first):
        peer.forward()
    assert (len(graphs), len(steps)) == (1, 1)
    peers.make(peers.COMPILE, Problem(layer_sets.tiny(), "sn")).forward()
    assert len(graphs) == 2


@pytest.mark.parametrize("empty_cache", [True, False])
def test_compilers_caches(monkeypatch, empty_cache):
    """Empty, so that all that compiling takes is known; or those of everyone, and then it is not."""
    compiled, folders = torch.compile, []

    def noting(function=None, **options):
        folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        return compiled(function, **(options | {"backend": "aot_eager"}))

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "everyone's")
    monkeypatch.setattr(torch, "compile", noting)
    names = [peers.COPY, peers.COMPILE]
    records = measure.layer_set("layers", layer_sets.tiny(), "sn", names, seconds=1e-9, empty_cache=empty_cache)
    assert (folders[0] == "everyone's") != empty_cache
    times = {r.prepare_seconds is not None for r in records if r.peer == peers.COMPILE}
    assert times == {empty_cache}
