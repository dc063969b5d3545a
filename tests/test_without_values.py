"""Fake tensors, FLOP counters, and weights that are elsewhere until their layer is called."""

import copy

import pytest
import torch
from support import LAYER_NAMES, Net, assert_same_gradients, images, norms, original, plain_copy, same, vectors_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import bssn_fast

modes = pytest.mark.parametrize("training", [True, False])
updates = pytest.mark.parametrize("update", ["forward", "access"])
both_uses = pytest.mark.parametrize("used", [True, False], ids=["used", "fresh"])


def made(update, training, used, variant="bssn"):
    model = bssn_fast.apply(Net().double(), variant, update=update).train(training)
    if used:
        model(images(2, torch.float64)).sum().backward()
        model.zero_grad()
    return model


def assert_real(model):
    """It trains and evaluates as plain operations do."""
    for tensor in (*model.parameters(), *model.buffers(), *bssn_fast.sigma(model).values()):
        assert type(tensor) in (torch.Tensor, nn.Parameter)
        assert tensor.isfinite().all()
    model.zero_grad()  # they may be fake
    twin = plain_copy(model)
    for training in (True, False):
        x = images(2, torch.float64)
        for net in (model, twin):
            net.train(training).zero_grad()
            net(x).square().sum().backward()
        assert_same_gradients(model, twin, 1e-9)


@modes
@updates
@both_uses
def test_fake_inputs(update, training, used):
    """Of a model that is real: its weights count as fake ones."""
    model = made(update, training, used)
    before = copy.deepcopy(model.state_dict())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = model(mode.from_tensor(images(2, torch.float64)))
        assert isinstance(out, FakeTensor)
        assert out.shape == (2, 1)
        out.sum().backward()
        assert model.first.weight.shape == original(model.first).shape
        with bssn_fast.cached(model):
            assert isinstance(
                model(model.first.weight.new_empty(2, 3, 6, 6)) + model(out.new_empty(1, 3, 6, 6)), FakeTensor
            )
    assert same(before, model.state_dict())
    assert_real(model)


@modes
@updates
@both_uses
def test_fake_weights(update, training, used):
    model = made(update, training, used)
    before = copy.deepcopy(model.state_dict())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        state = {k: mode.from_tensor(v) for k, v in model.state_dict(keep_vars=True).items()}
        out = torch.func.functional_call(model, state, (mode.from_tensor(images(2, torch.float64)),))
        out.sum().backward()
    for name in LAYER_NAMES:
        assert isinstance(state[f"{name}.parametrizations.weight.original"].grad, FakeTensor)
    assert same(before, model.state_dict())
    assert_real(model)


@modes
@updates
def test_model_made_of_fake_tensors(update, training):
    with FakeTensorMode():
        model = bssn_fast.apply(Net(), update=update).train(training)
        for _ in range(2):
            out = model(torch.randn(2, 3, 6, 6))
            assert out.shape == (2, 1)
            out.sum().backward()
        assert model.first.parametrizations.weight.original.grad.shape == (8, 3, 3, 3)


@modes
@updates
@both_uses
@pytest.mark.parametrize("variant", ["sn", "bssn"])
def test_counted_operations(update, training, used, variant):
    """The counter sees the model's own operations, and the run that it counts is like any other."""
    model, x = made(update, training, used, variant), images(2, torch.float64)
    twin, plain = plain_copy(model), Net().double()
    with FlopCounterMode(display=False) as counted:
        out = model(x)
        out.square().sum().backward()
    with FlopCounterMode(display=False) as expected:
        plain(x).square().sum().backward()
    assert counted.get_total_flops() == expected.get_total_flops() > 0
    theirs = twin(x)
    theirs.square().sum().backward()
    torch.testing.assert_close(out, theirs)
    assert_same_gradients(model, twin, 1e-9)
    assert_real(model)


# Offloading: a layer has its weights only while it is called.


def set_parameter(module, name, value):
    """Put a new Parameter on a module, as accelerate's set_module_tensor_to_device does."""
    old = module._parameters[name]
    module._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)


class Aligned:
    """Brings in what a layer needs before its forward and takes it away afterwards: as accelerate's AlignDevicesHook.

    It works on the layer and all modules in it, also on the one that holds the weight before normalisation.
    """

    def __init__(self, layer, how, buffers=False):
        self.how, self.buffers = how, buffers
        self.values = {k: v.detach().clone() for k, v in layer.state_dict().items()}
        self.current = {}
        self.leave(layer)
        layer.register_forward_pre_hook(self.bring)
        layer.register_forward_hook(self.leave, always_call=True)

    def named(self, layer):
        for prefix, module in layer.named_modules():
            for name in module._parameters:
                if module._parameters[name] is not None:
                    yield module, name, f"{prefix}.{name}".lstrip(".")

    def bring(self, layer, args):
        for module, name, key in list(self.named(layer)):
            if self.how == "parameter":
                set_parameter(module, name, self.values[key].clone())
                self.current[key] = module._parameters[name]
            else:
                module._parameters[name].data = self.values[key].clone()
        if self.buffers:
            for prefix, module in layer.named_modules():
                for name in module._buffers:
                    module._buffers[name] = self.values[f"{prefix}.{name}"].clone()

    def leave(self, layer, *_):
        for module, name, key in list(self.named(layer)):
            if self.how == "parameter":
                set_parameter(module, name, torch.empty_like(self.values[key], device="meta"))
            else:
                module._parameters[name].data = torch.empty(0, dtype=self.values[key].dtype)
        if self.buffers:
            for prefix, module in layer.named_modules():
                for name, value in module._buffers.items():
                    if value.device.type != "meta":
                        self.values[f"{prefix}.{name}"] = value.clone()
                    module._buffers[name] = value.to("meta")


LAYERS = ("first", "body.1", "body.3", "head")  # the embedding stays


@updates
@pytest.mark.parametrize("how", ["parameter", "data"])
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("moved", [LAYERS, ("body.1", "head")], ids=["all", "some"])
def test_weights_that_a_hook_brings_in(update, how, buffers, moved):
    model = made(update, True, False)
    twin = plain_copy(model)
    hooks = {name: Aligned(model.get_submodule(name), how, buffers) for name in moved}
    for _ in range(2):
        x = images(2, torch.float64)
        outputs = []
        for net in (model, twin):
            net.zero_grad()
            for training in (True, False):
                outputs.append(net.train(training)(x))
            with torch.no_grad():
                outputs.append(net(x))
        for k in range(3):
            torch.testing.assert_close(outputs[k], outputs[k + 3], rtol=1e-9, atol=1e-9)
    for name, hook in hooks.items():
        weight = original(model.get_submodule(name))
        assert weight.device.type == "meta" or weight.numel() == 0
        hook.bring(model.get_submodule(name), None)
    expected = norms(twin)
    for name, norm in norms(model).items():
        torch.testing.assert_close(tuple(norm.buffers()), tuple(expected[name].vectors), rtol=1e-9, atol=1e-9)


@updates
@modes
def test_gradients_of_weights_that_a_hook_brings_in(update, training):
    model = made(update, training, False)
    twin = plain_copy(model)
    hooks = {name: Aligned(model.get_submodule(name), "parameter") for name in LAYERS}
    for _ in range(2):
        x = images(2, torch.float64).requires_grad_()
        grads = []
        for net in (model, twin):
            net.zero_grad()
            net(x).square().sum().backward()
            grads.append(x.grad.clone())
            x.grad = None
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
        for name, hook in hooks.items():
            found = hook.current["parametrizations.weight.original"].grad
            theirs = twin.get_submodule(name).parametrizations.weight.original.grad
            torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-9)


@modes
def test_blocks_that_a_hook_brings_in(training):
    """A hook of a part with several layers."""
    model = made("forward", training, True)
    twin, x = plain_copy(model), images(2, torch.float64)
    Aligned(model.body, "parameter")
    for _ in range(2):
        torch.testing.assert_close(model(x), twin(x), rtol=1e-9, atol=1e-9)
    assert same({k: v for k, v in vectors_of(model).items() if v.numel() == 0}, {})
