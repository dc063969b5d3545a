"""Threads that train one model, forks and signals at any time, and long unrolls."""

from __future__ import annotations

import threading

import torch
from fuzzing import FACTOR, inputs, run_in_subprocess, small
from support import assert_same_gradients, plain_copy

from bssn_fast.calls import memory
from bssn_fast.modules.group import groups_of

FORK = """
import os, sys, threading, time, torch
from fuzzing import *

torch.set_num_threads(1)
model, forks = small(), int(sys.argv[1])
at_rest, go_on, lines, stops = threading.Event(), threading.Event(), 0, ()

def trace(frame, event, _):
    # A thread within torch may hold a lock of torch's, which a child would wait for in vain, with any model.
    # So the thread stands still in our own code, at another line each time.
    global lines
    if "bssn_fast" not in frame.f_code.co_filename:
        return None
    lines += event == "line"
    if event == "line" and lines in stops:
        at_rest.set(), go_on.wait(), go_on.clear()
    return trace

def step():
    global lines
    lines = 0
    sys.settrace(trace)
    model(inputs()).sum().backward()
    sys.settrace(None)

step(), step()
stops = {1 + k * lines // forks for k in range(forks)}
thread = threading.Thread(target=step, daemon=True)
thread.start()
for _ in stops:
    at_rest.wait(), at_rest.clear()
    pid = os.fork()
    if pid == 0:
        assert_right(model, inputs())
        os._exit(0)
    for _ in range(6000):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            break
        time.sleep(0.01)
    else:
        os.kill(pid, 9), os.waitpid(pid, 0)
        raise RuntimeError("the child hangs")
    assert status == 0, status
    go_on.set()
thread.join()
assert_right(model, inputs())
"""

SIGNAL = """
import signal, sys, torch
from fuzzing import *

torch.set_num_threads(1)
model, calls, busy = small(), 0, False

def handler(*_):
    global calls, busy
    if busy:
        return
    busy, calls = True, calls + 1
    with torch.set_grad_enabled(calls % 4 > 0):
        loss = model(inputs()).square().sum()
    if loss.requires_grad:
        torch.autograd.grad(loss, list(model.parameters()))
    busy = False

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
n = 0
while calls < int(sys.argv[1]):
    loss = model(inputs()).square().sum()
    if n % 2:  # the handler's graphs are its own
        model.zero_grad()
        loss.backward()
        if not all(p.grad.isfinite().all() for p in model.parameters()):
            raise AssertionError(n)
    n += 1
signal.setitimer(signal.ITIMER_REAL, 0)
assert_right(model, inputs())
"""


def test_forks_while_another_thread_runs_the_model():
    run_in_subprocess(FORK, str(round(10 * FACTOR) or 1))


def test_a_signal_handler_that_calls_the_model():
    run_in_subprocess(SIGNAL, str(round(100 * FACTOR)))


def test_threads_that_train_one_model():
    """With vectors that stand still, all threads' gradients are those of one thread."""
    model = small()
    x = [inputs() for _ in range(4)]
    for _ in range(200):
        with torch.no_grad():
            model(x[0])
    twin = plain_copy(model)
    rounds, errors = round(20 * FACTOR), []
    model.zero_grad()

    def train(k):
        try:
            for _ in range(rounds):
                out = model(x[k])
                grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
                found[k] = grads
        except Exception as error:
            errors.append(error)

    found: dict[int, tuple[torch.Tensor, ...]] = {}
    threads = [threading.Thread(target=train, args=(k,)) for k in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not errors, errors[0]
    for k in range(4):
        expected = torch.autograd.grad(twin(x[k]).square().sum(), list(twin.parameters()))
        for a, b in zip(found[k], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_threads_that_accumulate():
    model, errors = small(), []

    def train():
        try:
            for _ in range(round(20 * FACTOR)):
                model(inputs()).square().sum().backward()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=train) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not errors, errors[0]
    model.zero_grad()
    twin, x = plain_copy(model), inputs()
    for net in (model, twin):
        net(x).square().sum().backward()
    assert_same_gradients(model, twin, 1e-8)


def unroll(n, monkeypatch):
    """Return how often a buffer was looked at, in n calls before one backward pass, and how many buffers stay."""
    looks = 0
    free = memory._Buffer.free

    def counting(self):
        nonlocal looks
        looks += 1
        return free(self)

    with monkeypatch.context() as patch:
        patch.setattr(memory._Buffer, "free", counting)
        model = small()
        for _ in range(2):
            sum(model(inputs(1)).sum() for _ in range(n)).backward()
        forward = looks
        for _ in range(300):
            model(inputs(1)).sum().backward()
    (group,) = groups_of(model)
    kept = max(
        len(shelf._buffers)
        for plans in group._planned.plans.values()
        for plan, _ in plans
        for shelf in plan._normalizer._outputs._shelves.values()
    )
    return forward, kept


def test_long_unrolls(monkeypatch):
    """The time of a call does not grow with the number of calls before it; memory is given back afterwards."""
    few, kept = unroll(100, monkeypatch)
    many, kept_after_many = unroll(800, monkeypatch)
    assert many <= 10 * few
    assert kept <= 70
    assert kept_after_many <= 70


def test_a_fault_would_be_found(monkeypatch):
    """A shelf that begins every search at its first buffer, and keeps all of them."""

    def find(self):
        self._next = 0
        return self._search(self._buffers)

    monkeypatch.setattr(memory._Shelf, "find", find)
    few, _ = unroll(50, monkeypatch)
    many, kept_after_many = unroll(400, monkeypatch)
    assert many > 10 * few
    assert kept_after_many > 70
