"""`sn` is torch.nn.utils.parametrizations.spectral_norm: from equal u and v, everything is equal."""

import copy

import pytest
import torch
from support import LAYERS, images, layer_and_input, norm_of, original
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import bssn_fast

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def apply_torch(model, **settings):
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear, nn.Embedding)):
            spectral_norm(module, dim=int(isinstance(module, TRANSPOSED)), **settings)
    return model


def pair(model, **settings):
    """The model with our `sn` and with torch's, of equal u and v.

    torch iterates once more than we do when it registers its parametrization, which reads the weight.
    """
    theirs = copy.deepcopy(model)
    state = torch.get_rng_state()
    bssn_fast.apply(model, "sn", **settings)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    apply_torch(theirs, **settings)
    assert torch.equal(after, torch.get_rng_state()), "other random numbers drawn than torch draws"
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model, theirs


def tolerance(dtype):
    return {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]


def assert_close(found, expected, rtol):
    assert (found - expected).abs().max() <= rtol * expected.abs().max().clamp_min(1e-30)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_one_step(name, dtype, n):
    layer, x = layer_and_input(name, dtype)
    ours, theirs = pair(layer, n_power_iterations=n)
    rtol = tolerance(dtype)
    for a, b in zip(norm_of(ours).buffers(), norm_of(theirs).buffers(), strict=True):
        assert_close(a, b, rtol)
    for training in (False, True):
        ours.train(training), theirs.train(training)
        out, expected = ours(x), theirs(x)
        assert_close(out, expected, rtol)
        for model, y in ((ours, out), (theirs, expected)):
            model.zero_grad()
            y.square().sum().backward()
        assert_close(original(ours).grad, original(theirs).grad, 3 * rtol)
        for a, b in zip(norm_of(ours).buffers(), norm_of(theirs).buffers(), strict=True):
            assert_close(a, b, rtol)
        weight, p = original(theirs).detach(), norm_of(theirs)
        sigma = p._u @ p._reshape_weight_to_matrix(weight) @ p._v
        assert_close(bssn_fast.sigma(ours)[""], sigma, rtol)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        assert_close(ours.weight, theirs.weight, rtol)


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Tanh(), nn.ConvTranspose2d(8, 4, 4, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(400, 1)
    )


def test_hundred_optimizer_steps():
    """No further from a float64 run than twice torch's own float32."""
    model = small_net()
    ours, theirs = pair(copy.deepcopy(model))
    exact = copy.deepcopy(theirs).double()
    batches = [images(4) for _ in range(100)]

    def train(net):
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for x in batches:
            x = x.to(next(net.parameters()).dtype)
            loss = torch.relu(1 - net(x[:2])).mean() + torch.relu(1 + net(x[2:])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {k: v.double() for k, v in net.state_dict().items()}

    found, plain, truth = train(ours), train(theirs), train(exact)
    distance = [sum(((run[k] - truth[k]) ** 2).sum() for k in truth).sqrt() for run in (found, plain)]
    assert truth.keys() == found.keys()
    assert distance[1] > 0
    assert distance[0] <= 2 * distance[1]


@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_loads_strictly_both_ways(name):
    layer, x = layer_and_input(name)
    ours, theirs = pair(layer)
    ours(x), ours(x)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.train()
    theirs(x), theirs(x)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("update", ["forward", "access"])
def test_update_access_is_torchs_rule(update):
    """A layer used three times in a forward iterates three times, as torch does; otherwise once."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.Linear(6, 6), nn.Linear(6, 1)

        def forward(self, x):
            for _ in range(3):
                x = torch.tanh(self.cell(x))
            return self.head(x)

    model = Recurrent().double()
    with torch.no_grad():  # the iteration must not have converged
        model.cell.weight.copy_(torch.diag(torch.linspace(1, 1.2, 6, dtype=torch.float64)))
    ours, theirs = pair(model)
    if update == "access":
        bssn_fast.apply(ours, "sn", update="access")
    x = torch.randn(2, 6, dtype=torch.float64)
    for _ in range(2):
        assert torch.allclose(ours(x), theirs(x), rtol=1e-12) == (update == "access")
        ours(x).sum().backward(), theirs(x).sum().backward()
    equal = torch.allclose(norm_of(ours.cell)._u, norm_of(theirs.cell)._u, rtol=1e-12)
    assert equal == (update == "access")
    assert torch.allclose(norm_of(ours.head)._u, norm_of(theirs.head)._u, rtol=1e-12)
    if update == "access":
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_close(a.grad, b.grad, 1e-11)
