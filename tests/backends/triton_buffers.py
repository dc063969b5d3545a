"""What Triton's calls keep on the device, and what they share, in Triton's interpreter (run by test_triton.py)."""

import gc
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from triton_interpreted import LAYERS, Problem, check

from bssn_fast.backends.triton import launch, prepared


@pytest.fixture
def made(monkeypatch):
    """Fills new buffers with NaN; weak references to what was made."""
    references = []

    class Poisoned(prepared.Buffers):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.scratch.fill_(torch.nan)
            self.stats.fill_(torch.nan)
            references.extend(map(weakref.ref, (self.scratch, self.stats, self.addresses)))

    monkeypatch.setattr(launch, "Buffers", Poisoned)
    return references


def alive(references):
    gc.collect()
    return [reference for reference in references if reference() is not None]


@pytest.mark.parametrize("mode", ["single", "phases"])
def test_calls_keep_no_buffers_and_need_none_of_earlier_calls(monkeypatch, made, mode):
    monkeypatch.setenv("BSSN_FAST_TRITON_LAUNCH", mode)
    problem = Problem(LAYERS[:2], n_power_iterations=2)
    check(problem)
    assert made
    del problem
    assert not alive(made)


def test_what_stays_is_allocated_by_a_thread_of_its_own(monkeypatch):
    """CUDA graphs of torch.compile take what the running thread allocates, and complain about what stays of it."""
    threads = []
    for name in ("empty_table", "new_counters"):
        allocate = getattr(prepared, name)

        def noted(*arguments, allocate=allocate):
            threads.append(threading.get_ident())
            return allocate(*arguments)

        monkeypatch.setattr(prepared, name, noted)
    monkeypatch.setattr(launch, "_cache", prepared.Cache())
    check(Problem(LAYERS[:2]))
    assert threads
    assert threading.get_ident() not in threads


def test_a_call_between_anothers_table_and_launch_changes_nothing(monkeypatch):
    """As of another thread on the same stream, with the same weights and more gradients than arguments hold."""
    for module in (launch, prepared):
        monkeypatch.setattr(module, "MAX_ARGUMENTS", 2)
    problem, alone = Problem(LAYERS[:3]).forward(), Problem(LAYERS[:3]).forward()
    alone.backward()
    others = [torch.zeros_like(g) for g in problem.grads]
    write_table = launch.write_table

    def interrupted(table, values):
        write_table(table, values)
        monkeypatch.setattr(launch, "write_table", write_table)
        mine, problem.grads = problem.grads, others
        problem.backward()
        problem.grads = mine

    monkeypatch.setattr(launch, "write_table", interrupted)
    problem.backward()
    for found, expected in zip(problem.grad_weights, alone.grad_weights, strict=True):
        assert torch.equal(found, expected)


def test_captured_graphs_keep_tables_alone(monkeypatch):
    counters, tables, used_by = [], [], []

    def new_zeros(size, dtype):
        counters.append(torch.zeros(size, dtype=dtype))
        return counters[-1]

    def make():
        program = SimpleNamespace(counters_size=4)
        tables.append(SimpleNamespace(single=True, program=program, indices=[0], segments=torch.zeros(1)))
        return tables[-1], []

    def new_empty(size, dtype=torch.float32):
        counters.append(torch.empty(size, dtype=dtype))
        return counters[-1]

    like = SimpleNamespace(is_cuda=True, device=None, new_zeros=new_zeros, new_empty=new_empty)
    current, other = (SimpleNamespace(cuda_stream=n, wait_stream=lambda stream: None) for n in (1, 2))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: other)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: used_by.append(stream))
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    cache = prepared.Cache()
    table = cache.get("key", like, make)[0]
    assert used_by == [current, current]  # counters and table, which came from the other stream
    capturing = True
    first, second = cache.get("key", like, make), cache.get("key", like, make)
    assert first[0] is second[0] is table
    assert first[1] is not second[1]
    references = [weakref.ref(x) for x in counters]
    counters.clear()
    del first, second
    cache.clear()
    assert not alive(references)
    assert cache.get("key", like, make)[0] is table  # the graphs that were captured may be replayed
    assert len(tables) == 1
