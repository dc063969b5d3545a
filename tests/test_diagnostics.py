"""Diagnostics: right numbers, nothing changed by looking, clear refusals."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import bssn_fast
from bssn_fast import diagnostics


def model_and_input() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(4 * 25, 2)]
    return nn.Sequential(*layers), torch.randn(2, 3, 6, 6)


class FakeWriter:
    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars[tag] = scalar_value, global_step


@pytest.mark.parametrize(("shape", "dim"), [((8, 3, 5, 5), 0), ((3, 8, 5, 5), 1)])
def test_initial_variances_are_those_of_torchs_init(shape: tuple[int, ...], dim: int) -> None:
    values = diagnostics.initial_variances(shape, dim)
    fan_in, fan_out = 3 * 25, 8 * 25
    assert values == pytest.approx((1 / fan_in, 2 / (fan_in + fan_out), 2 / fan_in))
    mode = "fan_in" if dim == 0 else "fan_out"
    many = [500 * n if d == dim else n for d, n in enumerate(shape)]  # more outputs, the same fan
    drawn = nn.init.kaiming_normal_(torch.empty(many), mode=mode)
    assert drawn.var().item() == pytest.approx(values.kaiming, rel=0.05)
    assert nn.init._calculate_correct_fan(torch.empty(shape), mode) == fan_in


@pytest.mark.parametrize("variant", ["sn", "bssn"])
def test_measures_what_the_layers_use(variant: str) -> None:
    model, x = model_and_input()
    bssn_fast.apply(model, variant)
    used: dict[str, torch.Tensor] = {}
    for name in ("0", "2", "4"):
        model.get_submodule(name).register_forward_hook(lambda m, *_, name=name: used.update({name: m.weight}))
    model(x).square().sum().backward()
    before = copy.deepcopy(model.state_dict())
    measured = diagnostics.measure(model)
    assert measured.keys() == {"0", "2", "4"}
    for name, values in measured.items():
        layer = model.get_submodule(name)
        assert values.variance == pytest.approx(used[name].detach().double().var(correction=0).item(), rel=1e-5)
        assert values.gradient == pytest.approx(layer.parametrizations.weight.original.grad.norm().item(), rel=1e-5)
        assert values.sigma == pytest.approx(bssn_fast.sigma(model)[name].item(), rel=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_measures_after_compiled_code() -> None:
    model, x = model_and_input()
    bssn_fast.apply(model)
    torch.compile(lambda z: model(z).sum(), backend="eager")(x).backward()
    measured = diagnostics.measure(model)
    assert diagnostics.History().record(model, 0) == measured
    for name, sigma in bssn_fast.sigma(model).items():
        assert measured[name].sigma == pytest.approx(sigma.item())


def test_plain_layers_and_missing_gradients() -> None:
    model, x = model_and_input()
    bssn_fast.apply(model, names=["0"])
    model(x)
    measured = diagnostics.measure(model)
    assert measured["0"].gradient is None
    assert measured["4"].sigma is None
    assert measured["4"].variance == pytest.approx(model[4].weight.detach().double().var(correction=0).item())


def test_what_cannot_be_measured_is_named() -> None:
    with pytest.raises(ValueError, match="no convolution"):
        diagnostics.measure(nn.ReLU())
    with pytest.raises(ValueError, match="0: the weight is computed by something else"):
        diagnostics.measure(nn.Sequential(spectral_norm(nn.Linear(2, 2))))
    history = diagnostics.History()
    model, _ = model_and_input()
    history.record(model, 0)
    with pytest.raises(ValueError, match="other layers than before"):
        history.record(nn.Sequential(nn.Linear(2, 2)), 1)
    assert history.steps == [0]


def test_history_writes_and_plots(tmp_path: Path) -> None:
    model, x = model_and_input()
    bssn_fast.apply(model)
    history, writer = diagnostics.History(), FakeWriter()
    history.record(model, 0)  # no gradients yet: the picture leaves that point out
    for step in (1, 5):
        model(x).square().sum().backward()
        measured = history.record(model, step, writer)
    assert writer.scalars["gradient/0"] == (measured["0"].gradient, 5)
    assert len(writer.scalars) == 3 * 3
    assert history.initial["2"] == diagnostics.initial_variances((8, 4, 2, 2), 1)
    history.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tensorboard = importlib.import_module("torch.utils.tensorboard")
    model, _ = model_and_input()
    with tensorboard.SummaryWriter(tmp_path) as writer:
        diagnostics.History().record(model, 3, writer)
    assert list(tmp_path.iterdir())


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    history = diagnostics.History()
    history.record(model_and_input()[0], 0)

    def missing(name: str, package: str | None = None) -> object:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        history.plot(tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []
