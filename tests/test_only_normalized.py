"""Which layers `apply` takes of a model in which some carry a norm of torch's, and norms with others behind them."""

import copy
import warnings

import pytest
import torch
from support import norm_of, original
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hook_spectral_norm

import bssn_fast


def mixed():
    """Layers with torch's parametrization, without a norm, and with torch's hook; and one weight of an LSTM."""
    model = nn.ModuleDict(
        {
            "first": parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
            "plain": nn.Linear(4, 4),
            "last": hook_spectral_norm(nn.Linear(4, 1)),
            "lstm": nn.LSTM(3, 4),
        }
    )
    parametrizations.spectral_norm(model["lstm"], "weight_hh_l0")
    return model


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


def chain():
    layer = parametrizations.spectral_norm(nn.Linear(5, 4))
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def test_only_what_carries_a_norm_is_normalised():
    model = mixed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bssn_fast.apply(model, "sn", only="normalized")
    assert set(bssn_fast.sigma(model)) == {"first", "last", "lstm.weight_hh_l0"}
    assert not parametrize.is_parametrized(model["plain"])
    bssn_fast.apply(model, "bssn", only="normalized", scale={"last": 2.0})  # what it carries now is ours
    assert {p.settings.variant for p in (norm_of(model["first"]), norm_of(model["last"]))} == {"bssn"}
    assert norm_of(model["last"]).settings.scale == 2
    assert not parametrize.is_parametrized(model["plain"])
    bssn_fast.apply(model, "sn", only="normalized", filter_fn=lambda name, module: name == "last")
    assert norm_of(model["first"]).settings.variant == "bssn"


def test_without_the_option_it_is_said_what_is_added():
    with pytest.warns(UserWarning, match=r"2 layers carry torch's.*'plain' had none.*only='normalized'"):
        bssn_fast.apply(mixed(), "sn")
    for chosen in ({"names": ["first", "plain"]}, {"filter_fn": lambda name, module: True}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bssn_fast.apply(mixed(), "sn", **chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bssn_fast.apply(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "sn")
        bssn_fast.apply(nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3))), "sn")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"only": "converted"}, r"only must be 'normalized'"),
        ({"only": "normalized", "names": ["first"]}, r"names and only"),
        ({"only": "normalized", "filter_fn": lambda name, module: False}, r"nothing to normalise"),
    ],
)
def test_bad_choices(arguments, words):
    model = mixed()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=words):
        bssn_fast.apply(model, "sn", **arguments)
    assert list(model.state_dict()) == before
    with pytest.raises(ValueError, match="nothing to normalise"):
        bssn_fast.apply(nn.Linear(3, 3), "sn", only="normalized")


def test_a_chain_is_converted_in_place():
    torchs, model = nn.Sequential(chain(), nn.Linear(4, 2)), nn.Sequential(chain(), nn.Linear(4, 2))
    model.load_state_dict(torchs.state_dict())
    before = model[0].parametrizations.weight
    weight, u = before.original, before[0]._u.clone()
    bssn_fast.apply(model, "sn", only="normalized")
    parts = model[0].parametrizations.weight
    assert [type(p).__name__ for p in parts] == ["SpectralNormalization", "Doubled"]
    assert parts.original is weight
    assert torch.equal(parts[0]._u, u)
    for m in (torchs, model):
        m.train()
    for _ in range(3):
        x = torch.randn(3, 5)
        found, expected = model(x), torchs(x)
        torch.testing.assert_close(found, expected)
        for m, y in ((model, found), (torchs, expected)):
            m.zero_grad()
            y.sum().backward()
        torch.testing.assert_close(weight.grad, torchs[0].parametrizations.weight.original.grad)
    assert model.state_dict().keys() == torchs.state_dict().keys()
    torchs.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied.eval()(x), model.eval()(x))
    bssn_fast.apply(model, "bssn", scale=1.5, names=["0"])  # and ours at the beginning of a chain
    torch.testing.assert_close(model[0].weight, 2 * 1.5 * weight / bssn_fast.sigma(model)["0"])
    assert model[0].parametrizations.weight[0] is parts[0]


def test_a_conversion_that_fails_leaves_the_chain(monkeypatch):
    model = nn.Sequential(chain(), parametrizations.spectral_norm(nn.Linear(4, 2)))
    before = list(model[0].parametrizations.weight)
    from bssn_fast.modules import places

    calls = []

    def failing(module):
        calls.append(module)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(places.recurrent, "follow_weights", failing)
    with pytest.raises(KeyboardInterrupt):
        bssn_fast.apply(model, "sn")
    assert [x is y for x, y in zip(model[0].parametrizations.weight, before, strict=True)] == [True, True]
    model(torch.randn(2, 5)).sum().backward()
    assert original(model[0]).grad is not None
