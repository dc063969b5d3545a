"""torch's own `parametrize.remove_parametrizations`: what it leaves is a plain layer, and the others go on."""

import copy

import pytest
import torch
from support import LAYER_NAMES, Net, assert_same_gradients, images, norms, original, plain_copy, same, vectors_of
from torch.nn.utils import parametrize

import bssn_fast
from bssn_fast.modules import writes
from bssn_fast.modules.group import groups_of

ALL, SOME = LAYER_NAMES, ("first", "body.3")
removals = pytest.mark.parametrize("names", [ALL, SOME], ids=["all", "some"])
updates = pytest.mark.parametrize("update", ["forward", "access"])


def take_off(model, names, leave=True):
    for name in names:
        parametrize.remove_parametrizations(model.get_submodule(name), "weight", leave_parametrized=leave)


def nothing(model):
    pass


def read(model):
    return [model.get_submodule(name).weight for name in LAYER_NAMES]  # held by who wants to look at them


def train(model):
    model(images(2, torch.float64)).square().sum().backward()


def evaluate(model):
    model.eval()(images(2, torch.float64))
    model.train()


BEFORE = {f.__name__: f for f in (nothing, read, train, evaluate)}


def plain_twin(model):
    """The model with plain weights where the normalisation has been taken off, and plain operations elsewhere."""
    return plain_copy(model) if norms(model) else copy.deepcopy(model)


def assert_goes_on(model):
    """Training, optimizer steps of both kinds and evaluation are those of plain operations."""
    twin = plain_twin(model)
    steps = [torch.optim.Adam(net.parameters(), lr=0.01, fused=True) for net in (model, twin)]
    for _ in range(2):
        x = images(2, torch.float64)
        for net in (model, twin):
            net.train().zero_grad()
            net(x).square().mean().backward()
        assert_same_gradients(model, twin, 1e-9)
        steps[0].step(), steps[1].step()
        torch.testing.assert_close(model.eval()(x), twin.eval()(x))


@removals
@updates
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("leave", [True, False])
def test_all_that_programs_do_afterwards(names, update, before, leave):
    model, other = bssn_fast.apply(Net().double(), update=update), bssn_fast.apply(Net().double())
    held = BEFORE[before](model)
    weights = {n: original(model.get_submodule(n)).detach().clone() for n in norms(model)}
    take_off(model, names, leave)
    for name in names:
        layer = model.get_submodule(name)
        assert type(layer).__name__ == type(Net().get_submodule(name)).__name__
        assert leave or torch.equal(layer.weight.detach(), weights[name])
        with torch.no_grad():
            layer.weight.mul_(0.5).add_(0.01)
    train(other)
    if names == ALL:
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        model.load_state_dict({k: v + 0.01 for k, v in Net().double().state_dict().items()})
    assert_goes_on(model)
    train(other)
    del held
    assert_goes_on(model)


@removals
def test_no_hook_is_left(names, launches):
    model = bssn_fast.apply(Net())
    train(model.double())
    take_off(model, names)
    launches.clear()
    train(model)
    assert sum(n for n, _ in launches) == len(LAYER_NAMES) - len(names)
    assert len(list(groups_of(model))) == (names != ALL)
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == (names != ALL)
    assert not any(g.calls for g in groups_of(model))
    writes.settle()
    assert not writes._watched


@removals
def test_inside_a_block(names):
    model = bssn_fast.apply(Net().double())
    with bssn_fast.cached(model):
        train(model)
        take_off(model, names)
        with torch.no_grad():
            for name in names:
                model.get_submodule(name).weight.mul_(0.5)
        before = vectors_of(model)
        x = images(2, torch.float64)
        twin = plain_twin(model)
        torch.testing.assert_close(model(x), twin.eval()(x))
        assert same(before, vectors_of(model))
    assert_goes_on(model)


@removals
@updates
def test_between_forward_and_backward(names, update):
    """torch writes the normalised weight into the Parameter, which the graph has to refuse; or leaves it as it was."""
    model = bssn_fast.apply(Net().double(), update=update)
    twin, x = plain_copy(model), images(2, torch.float64)
    loss = model(x).square().sum()
    take_off(model, names)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model.zero_grad()
    assert_goes_on(model)

    model = bssn_fast.apply(Net().double(), update=update)
    twin = plain_copy(model)
    losses = [net(x).square().sum() for net in (model, twin)]
    take_off(model, names, leave=False)
    [loss.backward() for loss in losses]
    for name in LAYER_NAMES:
        layer = model.get_submodule(name)
        found = layer.weight if name in names else original(layer)
        expected = twin.get_submodule(name).parametrizations.weight.original.grad
        torch.testing.assert_close(found.grad, expected, rtol=1e-9, atol=1e-10)


def test_in_a_call():
    """By a hook of a layer: the layers that have been computed by then are not harmed."""
    model = bssn_fast.apply(Net().double())
    train(model)
    handle = model.first.register_forward_hook(lambda *_: take_off(model, ("head", "first")))
    with torch.no_grad():
        model(images(2, torch.float64))
    handle.remove()
    assert sorted(norms(model)) == ["body.1", "body.3", "embed"]
    assert_goes_on(model)


def test_apply_afterwards():
    model = bssn_fast.apply(Net().double())
    train(model)
    take_off(model, SOME)
    bssn_fast.apply(model)
    assert set(norms(model)) == set(LAYER_NAMES)
    model.zero_grad()
    assert_goes_on(model)
    bssn_fast.remove(model)
    assert not norms(model)
