"""Weights that are there only while torch's list of parametrizations is called, whose hooks bring them in."""

import pytest
import torch
from support import Net, images, norms, original, same, vectors_of
from torch import nn
from torch.nn.utils import parametrizations, prune

import bssn_fast

LAYERS = ("first", "body.1", "body.3", "head", "embed")


def pair(update):
    """A model of ours and one of torch's with the same weights and vectors, in float64."""
    ours, theirs = Net().double(), Net().double()
    for name in LAYERS:
        parametrizations.spectral_norm(theirs.get_submodule(name))
    bssn_fast.apply(ours, "sn", update=update).load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture(params=["forward", "access"])
def update(request):
    return request.param


def pruned(model, name="body.1"):
    prune.l1_unstructured(model.get_submodule(name).parametrizations.weight, "original", 0.4)
    return model


def test_pruning_what_is_normalised(update):
    """The mask is applied to the weight before normalisation, in each call, as with torch's norm."""
    ours, theirs = map(pruned, pair(update))
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3) for m in (ours, theirs)]
    for _ in range(3):
        x = images(4, torch.float64)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert not same(vectors_of(ours), vectors_of(pair(update)[0]))
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    x = images(2, torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert set(bssn_fast.sigma(ours)) == set(LAYERS)
    assert "body.1" in bssn_fast.summary(ours)
    fresh = pruned(pair(update)[0])
    fresh.load_state_dict(ours.state_dict())
    torch.testing.assert_close(fresh.eval()(x), ours(x))
    for model in (ours, theirs):
        prune.remove(model.body[1].parametrizations.weight, "original")
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    bssn_fast.remove(ours)


@pytest.mark.parametrize("change", [bssn_fast.remove, bssn_fast.apply])
def test_pruned_layers_are_named(update, change):
    model = pruned(pair(update)[0])
    before, kept = vectors_of(model), norms(model).keys()
    with pytest.raises(ValueError, match=r"body\.1.*prune\.remove"):
        change(model)
    assert same(before, vectors_of(model))
    assert norms(model).keys() == kept
    model(images(2, torch.float64))


@pytest.mark.parametrize("spectral_norm", [bssn_fast.spectral_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 4), lambda: nn.ConvTranspose2d(3, 4, 2)])
def test_the_parameter_behind_a_pruned_weight(spectral_norm, make):
    """The mask then applies to the normalised weight."""
    layer = make()
    prune.l1_unstructured(layer, "weight", 0.5)
    weight, mask = layer.weight_orig, layer.weight_mask
    spectral_norm(layer, "weight_orig")
    x = torch.randn(2, 3) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 4, 4)
    for _ in range(30):
        layer(x).sum().backward()
    assert layer.parametrizations.weight_orig.original is weight
    assert weight.grad is not None
    rows = (weight if isinstance(layer, nn.Linear) else weight.transpose(0, 1)).detach().flatten(1)
    torch.testing.assert_close(layer.eval().weight_orig, weight / torch.linalg.matrix_norm(rows, 2))
    layer(x)
    torch.testing.assert_close(layer.weight, layer.weight_orig * mask)


def test_compiling_a_pruned_model():
    ours, theirs = map(pruned, pair("forward"))
    compiled = torch.compile(ours, backend="eager")
    for training in (True, True, False, False):
        ours.train(training), theirs.train(training)
        x = images(2, torch.float64)
        torch.testing.assert_close(compiled(x), theirs(x))


def offload(model):
    """Keep all parameters elsewhere, and bring each in for the call of the module that it belongs to, and no other."""
    for module in model.modules():
        parameters = {n: p.detach() for n, p in module._parameters.items() if p is not None}
        if not parameters:
            continue
        forward = module.forward

        def bringing(*args, module=module, forward=forward, parameters=parameters):
            for name, value in parameters.items():
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
            try:
                return forward(*args)
            finally:
                away(module)

        module.forward = bringing
        away(module)


def away(module):
    for name, p in module._parameters.items():
        module._parameters[name] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)


@pytest.mark.parametrize("training", [False, True])
def test_offloading(update, training):
    """A layer's parameters are not those of torch's list of parametrizations, which is called to bring its own in."""
    ours, theirs = (m.train(training) for m in pair(update))
    offload(ours)
    assert {p.device.type for p in ours.parameters()} == {"meta"}
    for _ in range(3):
        x = images(2, torch.float64)
        torch.testing.assert_close(ours(x), theirs(x).detach())
    for name, vector in vectors_of(ours).items():
        torch.testing.assert_close(vector, theirs.get_buffer(name.replace("._", ".parametrizations.weight.0._")))


def test_a_model_without_values(update):
    """Shapes are what a call on the meta device gives, with gradients."""
    model = bssn_fast.apply(Net(), update=update).to("meta")
    for training in (True, False):
        out = model.train(training)(images().to("meta"))
        out.sum().backward()
        assert out.shape == (2, 1)
    assert original(model.first).grad.shape == (8, 3, 3, 3)
    loaded = bssn_fast.apply(Net(), update=update)
    model.to_empty(device="cpu").load_state_dict(loaded.state_dict())
    x = images()
    assert torch.equal(model.eval()(x), loaded.eval()(x))
