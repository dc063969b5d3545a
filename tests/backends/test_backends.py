"""Which backend is taken, and what is said where one cannot be."""

import pytest
import torch
from torch import nn

import bssn_fast
from bssn_fast import backends

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv("BSSN_FAST_BACKEND", raising=False)


@pytest.mark.parametrize("name", backends.NAMES)
def test_each_has_the_four_names(name):
    module = backends._module(name)
    assert isinstance(module.DEVICES, tuple)
    assert module.why_unavailable() is None or module.why_unavailable()
    assert callable(module.forward)
    assert callable(module.backward)


def test_default_is_the_compiled_one_where_it_is_built():
    expected = "cpu" if backends.why_unavailable("cpu", "cpu") is None else "reference"
    assert backends.get("", CPU).__name__.endswith(expected)


def test_default_from_the_environment(monkeypatch):
    monkeypatch.setenv("BSSN_FAST_BACKEND", "reference")
    assert backends.get("", CPU).__name__.endswith("reference")
    monkeypatch.setenv("BSSN_FAST_BACKEND", "cudda")
    with pytest.raises(bssn_fast.BackendUnavailableError, match=r"'cudda'.*reference"):
        backends.get("", CPU)


@pytest.mark.parametrize("name", ["triton", "cuda", "tpu"])
def test_one_that_cannot_serve_says_why(name):
    with pytest.raises(bssn_fast.BackendUnavailableError, match=rf"'{name}' cannot be used: \w+"):
        backends.get(name, CPU)


def test_the_one_asked_for_is_used(monkeypatch):
    reference = backends.get("reference", CPU)
    calls = []
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *args: calls.append(1) or forward(*args))
    model = bssn_fast.apply(nn.Linear(3, 2), backend="reference")
    calls.clear()
    model(torch.randn(1, 3)).sum().backward()
    assert calls == [1]
