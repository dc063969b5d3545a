"""Modes of torch that see all operations while a model with real weights is called."""

import pytest
import torch
from support import Net, images, original, same, vectors_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import bssn_fast


class Onlooker(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["forward", "access"])
def update(request):
    return request.param


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("called", [True, False])
def test_real_weights_among_fake_tensors(update, training, called):
    """As tools do that want to know shapes: nothing is computed, and nothing of the model changes."""
    model = bssn_fast.apply(Net(), update=update).train(training)
    if called:
        model(images())
    before, twin = vectors_of(model), bssn_fast.apply(Net(), update=update).train(training)
    twin.load_state_dict(model.state_dict())
    x = images()
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = model(x)
        assert out.shape == (2, 1)
        out.sum().backward()
    model.zero_grad()
    assert same(before, vectors_of(model))
    assert all(type(t) is torch.Tensor for t in bssn_fast.sigma(model).values())
    assert torch.equal(model(x), twin(x))
    assert same(vectors_of(model), vectors_of(twin))


def test_among_fake_tensors_in_a_cached_block(update):
    model = bssn_fast.apply(Net(), update=update)
    x = images()
    for fake_first in (True, False):
        before = vectors_of(model)
        with bssn_fast.cached(model):
            for fake in (fake_first, not fake_first):
                if fake:
                    with FakeTensorMode(allow_non_fake_inputs=True):
                        assert model(x).shape == (2, 1)
                else:
                    expected = model(x)
                    assert type(expected) is torch.Tensor
            assert torch.equal(model(x), expected)
        assert not same(before, vectors_of(model))


@pytest.mark.parametrize("mode", [lambda: FlopCounterMode(display=False), Onlooker])
def test_modes_that_look_on(update, mode):
    model, twin = (bssn_fast.apply(Net().double(), update=update) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    x = images(2, torch.float64)
    with mode():
        out = model(x)
        out.sum().backward()
    assert torch.equal(out, twin(x))
    assert same(vectors_of(model), vectors_of(twin))


def test_a_recorded_model_follows_its_weights(update):
    """The graph has the weights before normalisation, not what they were normalised to."""
    model = bssn_fast.apply(Net().double(), update=update).eval()
    x = images(2, torch.float64)
    model(x)  # whose results are kept
    graph = make_fx(model)(x)
    torch.testing.assert_close(graph(x), model(x))
    with torch.no_grad():
        original(model.first).add_(0.01 * torch.randn(8, 3, 3, 3))
    torch.testing.assert_close(graph(x), model(x))


def test_flops_of_the_layers_are_torchs(update):
    model = bssn_fast.apply(torch.nn.Linear(8, 4), "sn", update=update).eval()
    theirs = parametrizations.spectral_norm(torch.nn.Linear(8, 4)).eval()
    counts = []
    for layer in (model, theirs):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(3, 8))
        counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.addmm])
    assert counts[0] == counts[1]


def test_modes_in_turn(update):
    """What was found out in one mode, as that kernels can read the weights, is not taken to hold in another."""
    model = bssn_fast.apply(Net(), update=update)
    x = images()
    for mode in (Onlooker, Onlooker, lambda: FakeTensorMode(allow_non_fake_inputs=True), Onlooker):
        before = vectors_of(model)
        with mode():
            out = model(x)
        assert same(before, vectors_of(model)) is (type(out) is not torch.Tensor)
