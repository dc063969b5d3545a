"""The package creates tensors where the weights are, whatever torch's default device is."""

import contextlib

import pytest
import torch
from support import Net, images, norm_of, original
from test_loading import assert_sigma_right
from torch import nn
from torch.nn.utils import parametrizations

import bssn_fast
from bssn_fast import diagnostics


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


WAYS = {"default": default_device, "block": lambda: torch.device("meta")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", ["sn", "bssn"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_elsewhere(way, variant, backend):
    model, theirs, x = Net(), Net(), images(3)
    parametrizations.spectral_norm(theirs.first)
    state, value, plain = theirs.state_dict(), torch.randn(1, 64), torch.randn(4, 3)
    vectors = [nn.functional.normalize(torch.ones(n), dim=0) for n in (4, 3)]
    unusual, complex_value = nn.Linear(3, 4, dtype=torch.cfloat), torch.randn(4, 3, dtype=torch.cfloat)
    with WAYS[way]():
        bssn_fast.apply(model, variant, backend=backend)
        model.load_state_dict(state)
        model.head.weight = value
        model.first.weight.data.mul_(2)
        model.embed.reset_parameters()
        loss = bssn_fast.normalize([plain], [vectors], backend=backend)[1].sum()
        for _ in range(2):
            with bssn_fast.cached(model):
                loss = loss + torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).mean() + model(x).mean()
        loss.backward()
        diagnostics.measure(model)
        diagnostics.measure(theirs.body)
        history = diagnostics.History()
        history.record(model, 0)
        norm_of(model.head)._u.mul_(0.5)
        model.eval()(x)
        bssn_fast.summary(model)
        bssn_fast.spectral_norm(unusual)
        unusual.weight = complex_value
        unusual.load_state_dict({"weight": complex_value.clone(), "bias": unusual.bias.detach()})
    assert_sigma_right(model)
    for tensor in (*model.parameters(), *model.buffers(), *unusual.buffers()):
        assert tensor.device.type == "cpu"
    assert torch.equal(original(model.head), value)
    with WAYS[way]():
        bssn_fast.remove(model)(x)
