"""A signal handler, or a debugger, calls a model in the middle of its call: each of the two calls is as if alone."""

import copy
import signal
import sys

import pytest
import torch
from support import Net, assert_same_gradients, images, in_use, same, vectors_of
from torch import nn

import bssn_fast
from bssn_fast.modules.call import interrupts
from bssn_fast.modules.group import groups_of

needs_signals = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1 here")


def by_signal(action):
    before = signal.signal(signal.SIGUSR1, lambda *_: action())
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def by_method(action):
    class Saver:
        def __call__(self, number, frame):
            action()

    before = signal.signal(signal.SIGUSR1, Saver())
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def by_trace(action):
    def trace(frame, event, arg):
        sys.settrace(before)
        action()

    def anything():
        pass

    before = sys.gettrace()
    sys.settrace(trace)
    anything()
    sys.settrace(before)


WAYS = [pytest.param(by_signal, marks=needs_signals), pytest.param(by_method, marks=needs_signals), by_trace]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)


def interrupted(model, layer, way, action):
    """Let the action happen once, when this layer has been computed."""

    def hook(*_):
        handle.remove()
        way(action)

    handle = layer.register_forward_hook(hook)


def assert_same_models(model, twin):
    assert_same_gradients(model, twin, 1e-12)
    assert same(vectors_of(model), vectors_of(twin))
    assert in_use(model) == []


@ways
@pytest.mark.parametrize("layer", ["first", "body.1", "body.3", "head"])
def test_forward_and_backward_in_a_handler(way, layer):
    model = bssn_fast.apply(Net().double())
    twin, x, y = copy.deepcopy(model), images(2, torch.float64), images(3, torch.float64)
    interrupted(model, model.get_submodule(layer), way, lambda: model(y).square().sum().backward())
    found = model(x)
    found.sum().backward()
    expected = twin(x)
    expected.sum().backward()
    twin(y).square().sum().backward()
    assert torch.equal(found, expected)
    assert_same_models(model, twin)


@pytest.mark.parametrize("way", WAYS[:2], ids=["signal", "method"])  # nothing is traced in a tracing function
def test_handlers_in_handlers(way):
    model = bssn_fast.apply(Net().double())
    twin, inputs = copy.deepcopy(model), [images(2, torch.float64) for _ in range(3)]
    losses = []

    def call(k):
        if k < 2:
            interrupted(model, (model.first, model.body[1])[k], way, lambda: call(k + 1))
        losses.append(model(inputs[k]).square().sum())
        losses[-1].backward()

    call(0)
    for x in inputs:
        twin(x).square().sum().backward()
    assert_same_models(model, twin)


@ways
def test_a_part_that_has_calls_of_its_own(way):
    """Its layers are normalised in calls of the whole model, too."""
    model = bssn_fast.apply(Net().double())
    bssn_fast.apply(model.body)
    twin, x, h = copy.deepcopy(model), images(2, torch.float64), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    interrupted(model, model.body[1], way, lambda: model.body(h).square().sum().backward())
    found = model(x)
    found.sum().backward()
    expected = twin(x)
    expected.sum().backward()
    twin.body(h).square().sum().backward()
    assert torch.equal(found, expected)
    assert_same_models(model, twin)


@ways
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_handler_whose_call_is_interrupted(way, error):
    model = bssn_fast.apply(Net().double())
    twin, x = copy.deepcopy(model), images(2, torch.float64)

    def action():
        def fail(*_):
            raise error

        handle = model.first.register_forward_hook(fail)
        with pytest.raises(error):
            model(x)
        handle.remove()

    interrupted(model, model.first, way, action)
    found = model(x)
    found.sum().backward()
    expected = twin(x)
    expected.sum().backward()
    twin(x)
    assert torch.equal(found, expected)
    assert_same_models(model, twin)


def test_a_model_that_calls_itself_is_normalised_once():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, depth=3):
            x = self.layer(x).tanh()
            return (lambda frame: self(x, depth - 1))(None) if depth else x

    model = bssn_fast.apply(Recursive())
    twin, x = copy.deepcopy(model), torch.randn(2, 4)
    model(x).sum().backward()
    twin(x, 0)
    assert same(vectors_of(model), vectors_of(twin))


def test_another_stack_in_the_same_thread():
    """As greenlets have: nothing of it can have called what runs here."""

    def suspended():
        yield sys._getframe()

    elsewhere = suspended()
    assert interrupts(sys._getframe(), next(elsewhere))
    assert not interrupts(sys._getframe(), sys._getframe().f_back)


def test_nothing_is_set_aside_otherwise():
    model = bssn_fast.apply(Net())
    seen = []
    model.first.register_forward_hook(
        lambda *_: seen.extend(c.aside for g in groups_of(model) for c in g.calls.values())
    )
    model(images())
    assert seen == [()]
