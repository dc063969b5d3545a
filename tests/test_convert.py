"""Layers that carry one of torch's two spectral norms are taken over with their vectors."""

import abc
import copy

import pytest
import torch
from support import LAYERS, Net, images, layer_and_input, norm_of, norms, original
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

import bssn_fast
from bssn_fast.modules import convert

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def as_parametrization(layer, **settings):
    return parametrizations.spectral_norm(layer, dim=int(isinstance(layer, TRANSPOSED)), **settings)


def as_hook(layer, **settings):
    return nn.utils.spectral_norm(layer, **settings)


KINDS = {"parametrization": as_parametrization, "hook": as_hook}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_sn_goes_on_where_torch_was(name, kind):
    layer, x = layer_and_input(name, torch.float64)
    order, kind_of_layer = [n for n, _ in layer.named_parameters()], type(layer)
    theirs = KINDS[kind](layer)
    with torch.no_grad():
        theirs(x), theirs(x)
    ours = bssn_fast.apply(copy.deepcopy(theirs), "sn")
    # The hook iterates v before u: with it, iterates differ by half a step, and evaluations do not.
    for training in (False, True, True) if kind == "parametrization" else (False,):
        ours.train(training), theirs.train(training)
        torch.testing.assert_close(ours(x), theirs(x))
    fresh = bssn_fast.apply(layer_and_input(name, torch.float64)[0], "sn")
    assert ours.state_dict().keys() == fresh.state_dict().keys()
    fresh.load_state_dict(ours.state_dict(), strict=True)
    plain = bssn_fast.remove(ours)
    assert sorted(n for n, _ in plain.named_parameters()) == sorted(order)
    assert type(plain) is kind_of_layer
    assert not list(plain.buffers())
    assert not plain._forward_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_other_variants_keep_the_output_sides_vectors(kind):
    theirs = KINDS[kind](nn.Conv2d(3, 6, 3).double(), n_power_iterations=3, eps=1e-8)
    for _ in range(20):
        theirs(images(1, torch.float64))
    u = (theirs.weight_u if kind == "hook" else norm_of(theirs)._u).clone()
    weight = theirs.weight_orig if kind == "hook" else original(theirs)
    ours = bssn_fast.apply(theirs, "bssn")
    norm = norm_of(ours)
    assert original(ours) is weight
    assert torch.equal(norm._u, u)
    assert (norm.settings.n_power_iterations, norm.settings.eps) == (3, 1e-8)
    s_in = torch.linalg.matrix_norm(weight.detach().transpose(0, 1).flatten(1), 2)
    s_out = torch.linalg.matrix_norm(weight.detach().flatten(1), 2)
    assert bssn_fast.sigma(ours)[""] == pytest.approx(float(s_in + s_out) / 2, rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_optimizer_stay(kind):
    model = Net()
    for layer in (model.first, model.body[1], model.head):
        KINDS[kind](layer)
    ids = {id(p) for p in model.parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bssn_fast.apply(model)
    assert {id(p) for p in model.parameters()} == ids
    assert len(norms(model)) == 5
    before = original(model.first).detach().clone()
    model(images()).sum().backward()
    optimizer.step()
    assert not torch.equal(before, original(model.first))


@pytest.mark.parametrize("kind", KINDS)
def test_settings_given_win(kind):
    norm = norm_of(
        bssn_fast.apply(KINDS[kind](nn.Linear(3, 3), n_power_iterations=3, eps=1e-8), eps=1e-5, n_power_iterations=1)
    )
    assert (norm.settings.n_power_iterations, norm.settings.eps) == (1, 1e-5)


class Hooked(nn.Conv2d):
    """A layer that puts the norm on itself."""

    def __init__(self, *args):
        super().__init__(*args)
        SpectralNorm.apply(self, "weight", 3, 0, 1e-8)


class HookedTransposed(nn.ConvTranspose2d, abc.ABC):
    """With a metaclass of its own, and the output dimension that torch takes by default."""

    def __init__(self, *args, dim=1):
        super().__init__(*args)
        SpectralNorm.apply(self, name="weight", n_power_iterations=2, dim=dim, eps=1e-12)


class Parametrized(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        parametrizations.spectral_norm(self)

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class OfSuchLayers(nn.Module):
    """A model that puts norms on its layers itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Hooked(3, 6, 3), HookedTransposed(6, 4, 3)
        self.c, self.d = HookedTransposed(4, 3, 3, dim=0), Parametrized(3, 2)
        self.e = nn.utils.spectral_norm(nn.Linear(2, 2))

    def forward(self, x):
        return self.e(self.d(self.c(self.b(self.a(x))).mean((2, 3))))


def test_layers_and_models_that_call_torchs_spectral_norm_themselves():
    model, x = OfSuchLayers().double(), images(2, torch.float64)
    kinds = [type(m) for m in model.children()][:3]
    for _ in range(2):
        model(x)
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model.eval()(x)
    bssn_fast.apply(model, "sn")
    torch.testing.assert_close(model(x), expected)
    found = {n: (p.dim, p.settings.n_power_iterations, p.settings.eps) for n, p in norms(model).items()}
    assert found == {"a": (0, 3, 1e-8), "b": (1, 2, 1e-12), "c": (0, 2, 1e-12), "d": (0, 1, 1e-12), "e": (0, 1, 1e-12)}
    fresh = bssn_fast.apply(OfSuchLayers().double(), "sn").eval()
    fresh.load_state_dict(saved, strict=True)
    torch.testing.assert_close(fresh(x), expected)
    torch.testing.assert_close(copy.deepcopy(fresh)(x), expected)
    fresh.train()(x).sum().backward()
    assert all(p.grad is not None for p in fresh.parameters())
    bssn_fast.remove(model)
    assert [type(m) for m in model.children()][:3] == kinds
    torch.testing.assert_close(model(x), expected)


def test_copies_of_a_layer_of_torch_stay_as_they_are():
    """They share the class that torch's parametrize has made."""
    theirs = as_parametrization(nn.Linear(4, 3))
    ours = bssn_fast.apply(copy.deepcopy(theirs))
    x = torch.randn(2, 4)
    theirs(x), ours(x)
    assert parametrize.is_parametrized(theirs)


def test_another_parametrization_of_the_layer_stays():
    layer = parametrizations.weight_norm(nn.Linear(4, 4), "bias", dim=None)
    as_parametrization(layer)
    bssn_fast.apply(layer)
    assert parametrize.is_parametrized(layer, "bias")
    layer(torch.randn(1, 4)).sum().backward()
    bssn_fast.remove(layer)
    assert parametrize.is_parametrized(layer, "bias")
    layer(torch.randn(1, 4)).sum().backward()


def test_half_precision_vectors_of_torch_become_float32():
    theirs = as_parametrization(nn.Linear(4, 3).bfloat16())
    ours = bssn_fast.apply(theirs, "sn")
    ours(torch.randn(2, 4, dtype=torch.bfloat16))
    assert all(v.dtype == torch.float32 for v in norm_of(ours).buffers())


def test_find():
    assert convert.find(nn.Linear(2, 2), "x") is None
    ours = bssn_fast.apply(nn.Linear(2, 2))
    assert convert.find(ours, "x") is norm_of(ours)
