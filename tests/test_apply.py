"""`apply`, `remove`, `sigma`, `summary`: what is chosen, what a model keeps, and that all can be done again."""

import copy

import numpy as np
import pytest
import torch
from support import (
    LAYER_NAMES,
    LAYERS,
    VARIANTS,
    Net,
    images,
    layer_and_input,
    norm_of,
    norms,
    original,
    plain_copy,
    same,
    vectors_of,
)
from torch import nn
from torch.nn.utils import parametrize

import bssn_fast
from bssn_fast.modules.group import Group


def group_hooks(model):
    return [
        h
        for m in model.modules()
        for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
        if isinstance(getattr(h, "__self__", None), Group)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_type(name, variant):
    """Forward, backward, vectors and sigma, in training and evaluation, as the reference has them."""
    layer, x = layer_and_input(name, torch.float64)
    model = bssn_fast.apply(layer, variant, scale=0.9 if variant in ("ssn", "bssn") else None, n_power_iterations=2)
    twin = plain_copy(model)
    for training in (True, False, True):
        for net in (model, twin):
            net.train(training).zero_grad()
            net(x).square().sum().backward()
        torch.testing.assert_close(original(model).grad, original(twin).grad)
        torch.testing.assert_close(tuple(norm_of(model).buffers()), norm_of(twin).vectors)
        torch.testing.assert_close(bssn_fast.sigma(model)[""], norm_of(twin).sigma.detach())
    torch.testing.assert_close(model.weight, twin.weight)


def test_returns_the_model_and_normalises_all_layers():
    model = Net()
    assert bssn_fast.apply(model) is model
    assert tuple(norms(model)) == LAYER_NAMES
    assert all(p.settings.variant == "bssn" for p in norms(model).values())
    assert all(p.settings.scale == pytest.approx(2**0.5) for p in norms(model).values())
    assert {n: p.two_sided for n, p in norms(model).items()} == {
        "first": True, "body.1": True, "body.3": True, "head": False, "embed": False
    }  # fmt: skip


def test_parameters_stay_the_same_objects():
    model = Net()
    before = {id(p): p.detach().clone() for p in model.parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bssn_fast.apply(model)
    assert {id(p) for p in model.parameters()} == before.keys()
    assert all(torch.equal(p, before[id(p)]) for p in model.parameters())
    model(images()).sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, before[id(p)]) for p in model.parameters() if p.grad.any())
    model.eval()
    torch.testing.assert_close(model(images()).shape, torch.Size([2, 1]))


def test_is_torchs_parametrization():
    model = bssn_fast.apply(Net())
    assert parametrize.is_parametrized(model.first, "weight")
    assert parametrize.type_before_parametrizations(model.first) is nn.Conv2d
    assert isinstance(model.first, nn.Conv2d)
    assert "bssn" in repr(model)


def test_names_and_filter():
    model = bssn_fast.apply(Net(), names=["head", "first", "head"])
    assert set(norms(model)) == {"first", "head"}
    model = bssn_fast.apply(Net(), names=(n for n in ["head"]))
    assert set(norms(model)) == {"head"}
    seen = []
    model = bssn_fast.apply(Net(), filter_fn=lambda name, m: seen.append((name, type(m))) or isinstance(m, nn.Conv2d))
    assert set(norms(model)) == {"first", "body.1"}
    assert seen[0] == ("first", nn.Conv2d)
    assert [n for n, _ in seen] == list(LAYER_NAMES)
    model = bssn_fast.apply(Net(), names=["head", "first"], filter_fn=lambda name, m: name != "head")
    assert set(norms(model)) == {"first"}


def test_a_layer_used_under_two_names_is_normalised_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    bssn_fast.apply(model)
    assert len(shared.parametrizations.weight) == 1
    model(torch.randn(2, 4)).sum().backward()
    bssn_fast.remove(model)
    assert not parametrize.is_parametrized(shared)


def test_tied_weights_of_two_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    bssn_fast.apply(model)
    twin = plain_copy(model)
    assert original(model[0]) is original(model[2])
    x = torch.randn(2, 4, dtype=torch.float64)
    model(x).sum().backward(), twin(x).sum().backward()
    torch.testing.assert_close(original(model[0]).grad, original(twin[0]).grad)


def test_applying_again_replaces_the_settings_and_stacks_nothing():
    model = bssn_fast.apply(Net(), "sn", n_power_iterations=3, eps=1e-6)
    u, v = norm_of(model.first)._u.clone(), norm_of(model.first)._v.clone()
    parameters = [id(p) for p in model.parameters()]
    bssn_fast.apply(model, "bssn", scale=0.8)
    norm = norm_of(model.first)
    assert len(model.first.parametrizations.weight) == 1
    assert [id(p) for p in model.parameters()] == parameters
    assert (norm.settings.variant, norm.settings.scale) == ("bssn", 0.8)
    assert (norm.settings.n_power_iterations, norm.settings.eps) == (3, 1e-6)  # kept where none are given
    assert torch.equal(norm._u, u)
    assert torch.equal(norm._v, v)
    assert set(dict(norm.named_buffers())) == {"_u", "_v", "_u_in", "_v_in"}
    assert len(group_hooks(model)) == 2
    weight = original(model.first).detach()
    s_out, s_in = (torch.linalg.matrix_norm(weight.transpose(0, d).flatten(1), 2) for d in (0, 1))
    assert bssn_fast.sigma(model)["first"] == pytest.approx(float(s_out + s_in) / 2, rel=0.03)
    twin = plain_copy(model)
    torch.testing.assert_close(model(images(1) * 0), twin(images(1) * 0))

    bssn_fast.apply(model, "sn", eps=1e-12, n_power_iterations=1)
    assert set(dict(norm.named_buffers())) == {"_u", "_v"}
    assert set(model.state_dict()) == set(bssn_fast.apply(Net(), "sn").state_dict())
    model(images()).sum().backward()


@pytest.mark.parametrize("number", [lambda x: x, np.float32, np.float64, np.array, torch.tensor])
def test_numbers_of_other_libraries(number):
    """Settings are numbers of Python, whatever kind they were given as."""
    for n in (np.int64(2), np.int8(2), torch.tensor(2)):
        model = bssn_fast.apply(Net(), scale=number(1.5), eps=number(0.25), n_power_iterations=n)
        settings = norm_of(model.first).settings
        assert (settings.scale, settings.eps, settings.n_power_iterations) == (1.5, 0.25, 2)
        assert (type(settings.scale), type(settings.eps), type(settings.n_power_iterations)) == (float, float, int)
        vectors = [torch.tensor([1.0, 0]), torch.tensor([1.0, 0])]
        (weight,), _ = bssn_fast.normalize([2 * torch.eye(2)], [vectors], scale=number(1.5), n_power_iterations=n)
        torch.testing.assert_close(weight, 1.5 * torch.eye(2))


def test_access_and_back():
    model = bssn_fast.apply(Net())
    bssn_fast.apply(model, update="access")
    assert group_hooks(model) == []
    model(images())
    bssn_fast.apply(model)
    assert len(group_hooks(model)) == 2
    model(images())


def test_some_layers_with_other_settings():
    model = bssn_fast.apply(Net().double(), "bssn")
    bssn_fast.apply(model, "sn", names=["head", "embed"])
    twin = plain_copy(model)
    assert [p.settings.variant for p in norms(model).values()] == ["bssn"] * 3 + ["sn"] * 2
    x = images(2, torch.float64)
    for _ in range(2):
        torch.testing.assert_close(model(x), twin(x))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("variant", ["sn", "bssn"])
def test_remove(name, variant):
    """The evaluated weight becomes the parameter, which is the same object in the same place."""
    layer, x = layer_and_input(name)
    order = [n for n, _ in layer.named_parameters()]
    ids, kind = [id(p) for p in layer.parameters()], type(layer)
    bssn_fast.apply(layer, variant)
    layer(x)
    layer.eval()
    expected, vectors = layer(x), vectors_of(layer)
    layer.train()
    assert bssn_fast.remove(layer) is layer
    assert vectors
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert type(layer) is kind
    assert [n for n, _ in layer.named_parameters()] == order
    assert [id(p) for p in layer.parameters()] == ids
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())
    assert group_hooks(layer) == []
    assert not list(layer.buffers())
    bssn_fast.apply(layer)  # and once more
    layer(x)


@pytest.mark.parametrize("autocast", [False, True])
def test_remove_after_a_large_step_leaves_what_evaluation_computes(autocast):
    """And so does a gain that is learned from then on: u and v of before the step do not belong to the weights."""
    torch.manual_seed(0)
    model, x = bssn_fast.apply(Net(), "sn"), images()
    model(x)
    with torch.no_grad():
        for name in norms(model):
            original(model.get_submodule(name)).normal_()
    expected = copy.deepcopy(model).eval()(x)
    with torch.autocast("cpu", enabled=autocast):
        plain = bssn_fast.remove(copy.deepcopy(model))
        learning = bssn_fast.apply(copy.deepcopy(model), "sn", gain="learn")
    torch.testing.assert_close(plain(x), expected)
    torch.testing.assert_close(learning.eval()(x), expected)


def test_remove_part_of_a_model():
    model = bssn_fast.apply(Net())
    bssn_fast.remove(model.body)
    assert set(norms(model)) == {"first", "head", "embed"}
    before = vectors_of(model)
    model(images()).sum().backward()
    assert not torch.equal(before["first._u"], norm_of(model.first)._u)
    bssn_fast.remove(model)
    assert group_hooks(model) == []


def test_removed_model_saves_and_loads_as_if_nothing_had_been():
    model = bssn_fast.remove(bssn_fast.apply(Net()))
    Net().load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("after_forward", [False, True])
def test_copies_are_independent(after_forward):
    model = bssn_fast.apply(Net().double())
    x = images(2, torch.float64)
    if after_forward:
        model(x).sum().backward()
    twin = copy.deepcopy(model)
    before, values = vectors_of(model), {k: v.clone() for k, v in bssn_fast.sigma(model).items()}
    assert same(before, vectors_of(twin))
    assert same(values, bssn_fast.sigma(twin))
    twin(x).square().sum().backward()
    with torch.no_grad():
        original(twin.first).mul_(2)
    twin.eval()(x)
    assert same(before, vectors_of(model))
    assert same(values, bssn_fast.sigma(model))
    assert not same(before, vectors_of(twin))
    reference = plain_copy(model)
    torch.testing.assert_close(model(x), reference(x))

    bssn_fast.remove(twin)  # their layers share classes that torch has made
    assert group_hooks(twin) == []
    torch.testing.assert_close(model(x), reference(x))
    bssn_fast.remove(model)


def test_copy_of_a_part():
    model = bssn_fast.apply(Net())
    model(images())
    body = copy.deepcopy(model.body)
    before = vectors_of(model)
    body(torch.randn(2, 8, 6, 6)).sum().backward()
    assert same(before, vectors_of(model))
    assert all(original(model.get_submodule(n)).grad is None for n in LAYER_NAMES)


def test_copies_in_a_cached_block_are_outside_it():
    model = bssn_fast.apply(Net())
    with bssn_fast.cached(model):
        model(images())
        twin = copy.deepcopy(model)
        before = vectors_of(twin)
        twin(images())
        first = vectors_of(twin)
        twin(images())
        assert not same(before, first)
        assert not same(first, vectors_of(twin))


def test_sigma():
    model = bssn_fast.apply(Net(), "bssn")
    values = bssn_fast.sigma(model)
    assert tuple(values) == LAYER_NAMES
    assert all(v.shape == () and v.dtype == torch.float32 and not v.requires_grad for v in values.values())
    model(images()).sum().backward()
    assert not same(values, bssn_fast.sigma(model))
    for name, value in bssn_fast.sigma(model).items():
        layer = model.get_submodule(name).eval()
        scale = norm_of(layer).settings.scale
        torch.testing.assert_close(layer.weight * value / scale, original(layer), rtol=1e-5, atol=1e-7)


def test_sigma_converges_to_the_exact_one():
    model = bssn_fast.apply(Net().double(), "bssn", n_power_iterations=500)
    model(images(2, torch.float64))
    for name, value in bssn_fast.sigma(model).items():
        weight = original(model.get_submodule(name)).detach()
        norms_of_sides = [torch.linalg.matrix_norm(weight.transpose(0, d).flatten(1), 2) for d in (0, 1)]
        torch.testing.assert_close(value, sum(norms_of_sides) / 2, rtol=1e-6, atol=0)


def test_sigma_computes_nothing(launches):
    model = bssn_fast.apply(Net())
    launches.clear()
    bssn_fast.sigma(model), bssn_fast.summary(model)
    assert launches == []


def test_summary():
    model = bssn_fast.apply(Net(), "ssn", scale=1.25)
    lines = bssn_fast.summary(model).splitlines()
    assert len(lines) == 1 + len(LAYER_NAMES)
    assert lines[0].split() == ["layer", "type", "weight", "variant", "sigma"]
    value = bssn_fast.sigma(model)["body.3"]
    assert lines[3].split() == ["body.3", "ConvTranspose2d", "5x4x2x2", "ssn", "x", "1.25", f"{value:.4g}"]
    assert "(model)" in bssn_fast.summary(bssn_fast.apply(nn.Linear(2, 2)))


@pytest.mark.parametrize("what", ["gain", "remove"])
def test_a_failure_leaves_vectors_that_do_not_belong(what, monkeypatch):
    model = bssn_fast.apply(Net(), "bsn")
    model(images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("bssn_fast.model.take_off", fail)
    monkeypatch.setattr("bssn_fast.model.Group.hook", fail)
    with pytest.raises(KeyboardInterrupt):
        bssn_fast.apply(model, "bsn", gain="learn") if what == "gain" else bssn_fast.remove(model)
    assert same(dict(model.state_dict()), before)
