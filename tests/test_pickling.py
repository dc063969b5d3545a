"""Whole models in files and other processes, as with torch's older hook: what comes back is the model, bit by bit."""

import copy
import io
import pickle

import pytest
import torch
from support import LAYERS, Net, images, layer_and_input, original, same
from torch import nn
from torch.nn.utils import parametrize
from workers import step, step_in_process

import bssn_fast


def by_pickle(model, protocol=pickle.DEFAULT_PROTOCOL):
    return pickle.loads(pickle.dumps(model, protocol))


def by_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_goes_on_alike(model, twin, x, call=lambda model, x: model(x)):
    """Both give the same, bit by bit, in evaluation, in training and after it; neither changes the other."""
    model.zero_grad(), twin.zero_grad()
    for training in (False, True):
        model.train(training), twin.train(training)
        assert torch.equal(call(model, x), call(twin, x))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    call(twin, x).square().sum().backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter -= 0.1 * parameter.grad
    assert same(dict(model.state_dict()), before)
    call(model, x).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    assert same(dict(model.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("copied", [by_pickle, by_file])
@pytest.mark.parametrize("update", ["forward", "access"])
@pytest.mark.parametrize("how", [{}, {"scale": 1.2}, {"at_most": 0.7}, {"gain": "learn"}])
def test_a_model_comes_back_as_it_was(copied, update, how):
    variant = "bssn" if "scale" in how else "bsn"
    model, x = bssn_fast.apply(Net(), variant, update=update, **how), images()
    step(model, x)
    twin = copied(model)
    assert same(dict(model.state_dict()), dict(twin.state_dict()))
    assert bssn_fast.summary(twin) == bssn_fast.summary(model)
    assert repr(twin) == repr(model)
    assert_goes_on_alike(model, twin, x)
    assert_goes_on_alike(model, copied(twin), x)
    plain = bssn_fast.remove(copied(twin))
    assert type(plain.first) is nn.Conv2d
    torch.testing.assert_close(by_pickle(plain)(x), twin.eval()(x))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_each_kind_of_layer(name, protocol):
    layer, x = layer_and_input(name)
    bssn_fast.apply(layer)
    layer(x)
    twin = by_pickle(layer, protocol)
    assert isinstance(twin, type(layer).__bases__[0])
    assert_goes_on_alike(layer, twin, x)


def test_a_recurrent_layer():
    layer, x = bssn_fast.apply(nn.LSTM(3, 4), names=["weight_hh_l0", "weight_ih_l0"]), torch.randn(5, 2, 3)
    assert_goes_on_alike(layer, by_pickle(layer), x, lambda layer, x: layer(x)[0])


def test_attention_in_blocks():
    model = bssn_fast.apply(nn.MultiheadAttention(4, 2), "sn", blocks={"in_proj_weight": 3})
    x = torch.randn(5, 2, 4)
    assert_goes_on_alike(model, by_pickle(model), x, lambda model, x: model(x, x, x)[0])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


def test_shared_weights_stay_shared():
    model, x = bssn_fast.apply(Tied()), torch.tensor([0, 3, 4])
    twin = by_pickle(model)
    assert original(twin.embed) is original(twin.head)
    assert twin.embed.parametrizations.weight[0] is twin.head.parametrizations.weight[0]
    assert_goes_on_alike(model, twin, x)


def test_parametrizations_beside_and_after_ours():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "bias", nn.Tanh(), unsafe=True)
    bssn_fast.apply(model, "sn")
    parametrize.register_parametrization(model[2], "weight", nn.Softplus(), unsafe=True)
    first, second = by_pickle(model), by_pickle(model)
    x = torch.randn(3, 4)
    assert_goes_on_alike(model, first, x)
    with parametrize.cached():  # torch finds its results by the module that a class was made for
        for twin in (first, second):
            inner = twin[2].parametrizations.weight[0](original(twin[2]))
            torch.testing.assert_close(twin[2].weight, nn.functional.softplus(inner))


def test_a_part_of_a_model_and_a_group_of_its_own():
    model = nn.Sequential(bssn_fast.apply(Net(), "sn"), nn.Linear(1, 1))
    x = images()
    model(x)
    assert_goes_on_alike(model, by_pickle(model), x)
    assert_goes_on_alike(model[0].first, by_pickle(model[0].first), x)


class Own(nn.Linear):
    """A layer with a say in how it is pickled."""

    def __init__(self, *args):
        super().__init__(*args)
        self.open_file, self.note = object, "new"

    def __getstate__(self):
        return {**self.__dict__, "open_file": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.note = "loaded"


def test_a_layer_with_a_say_in_how_it_is_pickled():
    layer, x = bssn_fast.apply(Own(4, 3)), torch.randn(2, 4)
    twin = by_pickle(layer)
    assert (twin.open_file, twin.note, layer.note) == (None, "loaded", "new")
    assert_goes_on_alike(layer, twin, x)


def made_again(name, state):
    module = globals()[name].__new__(globals()[name])
    module.__dict__.update(state)
    return module


class Persistent(nn.Sequential):
    """Pickled by a function of its own that makes the whole, as StyleGANs' networks are."""

    def __reduce__(self):
        return made_again, ("Persistent", super().__reduce__()[2])


def test_a_model_that_a_function_of_its_own_makes_again():
    model, x = bssn_fast.apply(Persistent(nn.Linear(4, 4), nn.Tanh())), torch.randn(2, 4)
    assert_goes_on_alike(model, by_pickle(model), x)


class PersistentLayer(nn.Linear):
    def __reduce__(self):
        state = super().__reduce__()[2]
        return made_again, ("PersistentLayer", {k: v for k, v in state.items() if k != "_load_state_dict_pre_hooks"})


def test_a_layer_that_a_function_of_its_own_makes_again():
    layer, x = bssn_fast.apply(PersistentLayer(4, 4)), torch.randn(2, 4)
    twin = by_pickle(layer)
    assert type(twin).__bases__ == (PersistentLayer,)
    assert torch.equal(layer(x), twin(x))


def test_what_is_written_into_a_weight_before_its_first_use_counts():
    layer = bssn_fast.apply(nn.Linear(4, 3), "sn")
    nn.init.eye_(layer.weight)
    assert torch.equal(original(by_pickle(layer)), torch.eye(3, 4))


def test_in_the_middle_of_a_call():
    model, x, twins = bssn_fast.apply(Net()), images(), []
    model.body.register_forward_hook(lambda *_: twins or twins.append(by_pickle({"model": model.first})["model"]))
    expected = model(x)
    assert torch.equal(twins[0].train(False)(x), model.first.train(False)(x))
    expected.sum().backward()


def test_frozen_weights_stay_frozen():
    model = bssn_fast.apply(Net())
    original(model.head).requires_grad_(False)
    model(images()).sum().backward()
    twin = by_file(model)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_shallow_copy_shares_what_the_layer_has():
    model, x = bssn_fast.apply(Net()), images()
    twin = copy.copy(model.first)
    assert original(twin) is original(model.first)
    assert torch.equal(twin.eval()(x), model.first.eval()(x))
    whole = copy.copy(model)
    assert torch.equal(whole.eval()(x), model.eval()(x))


def test_a_model_sent_to_another_process_shares_its_memory():
    model, x = bssn_fast.apply(Net()), images()
    model(x)
    twin = copy.deepcopy(model)
    step(twin, x)
    torch.multiprocessing.spawn(step_in_process, (model, x))
    assert same(dict(model.state_dict()), dict(twin.state_dict()))
    assert_goes_on_alike(model, twin, x)
