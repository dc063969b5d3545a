"""torch.nn.DataParallel: a copy of the model on each device, for each call.

Without GPUs only torch's way of copying can be run: here all devices are the CPU.
"""

import copy
import pickle
import threading

import pytest
import torch
from support import LAYERS, Net, gradients, images, layer_and_input, norms, original, same, vectors_of
from torch import nn
from torch.nn.parallel import replicate
from torch.nn.utils import parametrizations

import bssn_fast


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """The first device gets the tensors themselves, others copies in one buffer, as from torch's broadcasts."""

    def broadcast(tensors, devices, detach=False):
        copies = []
        for j, _ in enumerate(devices):
            sent = [t.detach() if detach else t for t in tensors]
            if j or not detach:
                sent = [t.clone() if j else t.view_as(t) for t in sent]
            copies.append(list(tensors) if detach and not j else sent)
        return copies

    scope = replicate.__globals__
    monkeypatch.setitem(scope, "_get_device_index", lambda device, optional: device)
    monkeypatch.setitem(scope, "_broadcast_coalesced_reshape", broadcast)


def parallel(model, x, n=2, call=lambda model, x: model(x)):
    """Call copies of the model with parts of the batch, each in a thread, as DataParallel does."""
    copies = replicate(model, list(range(n)), not torch.is_grad_enabled())
    results, modes = [None] * n, torch.is_grad_enabled()

    def run(j, part):
        try:
            with torch.set_grad_enabled(modes):
                results[j] = call(copies[j], part)
        except Exception as error:
            results[j] = error

    threads = [threading.Thread(target=run, args=each) for each in enumerate(x.chunk(n))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return torch.cat(results)


class Rows(Net):
    """Each image's output depends on that image alone, so that parts of a batch give the same."""

    def forward(self, x):
        x = self.body(self.first(x)).tanh().flatten(1)
        return self.head(x) + (self.embed(torch.zeros(len(x), dtype=torch.long)) * x).sum(1, keepdim=True)


def assert_alike(model, twin, rtol=1e-10):
    for name, grad in gradients(twin).items():
        torch.testing.assert_close(gradients(model)[name], grad, rtol=rtol, atol=rtol, msg=name)
    torch.testing.assert_close(vectors_of(model), vectors_of(twin), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("update", ["forward", "access"])
@pytest.mark.parametrize("how", [{}, {"scale": 1.2}, {"at_most": 0.7}, {"gain": "learn"}])
@pytest.mark.parametrize("n", [2, 3])
def test_as_one_device_with_the_whole_batch(update, how, n):
    torch.manual_seed(0)
    model = bssn_fast.apply(Rows().double(), "bssn" if "scale" in how else "bsn", update=update, **how)
    twin = bssn_fast.apply(Rows().double(), "bssn" if "scale" in how else "bsn", update=update, **how)
    twin.load_state_dict(model.state_dict())
    for _ in range(3):
        x = images(6, torch.float64)
        torch.testing.assert_close(parallel(model, x, n), twin(x), rtol=1e-10, atol=1e-10)
        model.zero_grad(), twin.zero_grad()
        parallel(model, x, n).square().sum().backward(), twin(x).square().sum().backward()
        assert_alike(model, twin)
        torch.testing.assert_close(bssn_fast.sigma(model), bssn_fast.sigma(twin))
        with torch.no_grad():
            for net in (model, twin):
                for parameter in net.parameters():
                    parameter -= 0.01 * parameter.grad
    model.eval(), twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(parallel(model, x, n), twin(x), rtol=1e-10, atol=1e-10)
    parallel(model, x, n).square().sum().backward(), twin(x).square().sum().backward()
    assert_alike(model, twin)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "embedding"])
def test_as_torch_with_each_kind_of_layer(name):
    layer, x = layer_and_input(name, torch.float64)
    theirs, _ = layer_and_input(name, torch.float64)
    theirs.load_state_dict(layer.state_dict())
    parametrizations.spectral_norm(theirs)
    ours = bssn_fast.apply(layer, "sn")
    ours.load_state_dict(theirs.state_dict())
    for _ in range(2):
        found, expected = parallel(ours, x, 1), parallel(theirs, x, 1)
        torch.testing.assert_close(found, expected)
    found.square().sum().backward(), expected.square().sum().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients(ours)[name], parameter.grad)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("made", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_one_launch_for_each_device(launches, made):
    model, x = made(bssn_fast.apply(Rows())), images(4)
    replicate(model, [0, 1])
    launches.clear()
    parallel(model, x).sum().backward()
    forward = [n for n, _ in launches]
    alone = bssn_fast.apply(Rows())
    launches.clear()
    alone(x).sum().backward()
    assert forward == 2 * [n for n, _ in launches]


class Inside(nn.Module):
    """A model that has copies made of a part of itself, as if that were in a DataParallel."""

    def __init__(self, made):
        super().__init__()
        self.net, self.head, self.made = Rows(), nn.Linear(1, 2), made

    def forward(self, x):
        return self.head(self.made(self.net, x) + self.made(self.net, 2 * x))


@pytest.mark.parametrize("update", ["forward", "access"])
@pytest.mark.parametrize("parts", ["whole", "both"])
def test_a_part_of_a_model(parts, update):
    """The model's call has had the iteration; and copies are not those of the model that was given to `apply`."""

    def make(made):
        model = Inside(made).double()
        if parts == "both":
            bssn_fast.apply(model.net, names=["first"], update=update)
        return bssn_fast.apply(model, update=update, filter_fn=lambda name, _: parts == "whole" or name != "net.first")

    model, twin, x = make(parallel), make(lambda net, x: net(x)), images(4, torch.float64)
    twin.load_state_dict(model.state_dict())
    for _ in range(2):
        model(x).square().sum().backward(), twin(x).square().sum().backward()
        assert_alike(model, twin)


def test_applied_after_wrapping(launches):
    wrapped = bssn_fast.apply(nn.DataParallel(Rows()))
    assert all(name.startswith("module.") for name in bssn_fast.sigma(wrapped))
    parallel(wrapped.module, images(4))
    launches.clear()
    parallel(wrapped.module, images(4))
    assert [n for n, _ in launches] == [5, 5]
    wrapped(images(4)).sum().backward()
    bssn_fast.remove(wrapped)
    assert not wrapped.module._forward_pre_hooks


def test_two_forwards_before_one_backward():
    model, x, y = bssn_fast.apply(Rows().double()), images(4, torch.float64), images(4, torch.float64)
    twin = bssn_fast.apply(Rows().double())
    twin.load_state_dict(model.state_dict())
    (parallel(model, x).relu().sum() - parallel(model, y).square().sum()).backward()
    (twin(x).relu().sum() - twin(y).square().sum()).backward()
    assert_alike(model, twin)


def test_parts_and_the_whole_that_are_normalised_apart():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.head = Rows(), nn.Linear(1, 2)

        def forward(self, x):
            return self.head(self.net(x) + self.net(2 * x))

    def make():
        whole = Whole().double()
        bssn_fast.apply(whole, names=["head", "net.first"])
        bssn_fast.apply(whole.net, names=["body.1", "body.3", "head", "embed"])
        return whole

    model, twin, x = make(), make(), images(4, torch.float64)
    twin.load_state_dict(model.state_dict())
    parallel(model, x).square().sum().backward(), twin(x).square().sum().backward()
    assert_alike(model, twin)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_use_the_vectors_of_their_own_forward(reentrant):
    model, x = bssn_fast.apply(Rows().double()), images(4, torch.float64)
    twin = bssn_fast.apply(Rows().double())
    twin.load_state_dict(model.state_dict())

    def checkpointed(model, x):
        return torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    parallel(model, x, call=checkpointed).square().sum().backward()
    twin(x).square().sum().backward()
    assert_alike(model, twin)


def test_recurrent_layers_and_shared_weights():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.a, self.b = nn.GRU(3, 3, batch_first=True), nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.cell(x)[0]).tanh())

    def make():
        return bssn_fast.apply(Recurrent().double(), names=["cell.weight_hh_l0", "cell.weight_ih_l0", "a", "b"])

    model, twin, x = make(), make(), torch.randn(4, 5, 3, dtype=torch.float64)
    twin.load_state_dict(model.state_dict())
    parallel(model, x).square().sum().backward(), twin(x).square().sum().backward()
    assert_alike(model, twin)


def test_frozen_weights_and_half_precision():
    model, x = bssn_fast.apply(Rows()), images(4)
    original(model.first).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        found = parallel(model, x)
    found.float().sum().backward()
    assert original(model.first).grad is None
    assert original(model.head).grad is not None
    half = bssn_fast.apply(Rows().bfloat16())
    parallel(half, images(4, torch.bfloat16)).float().sum().backward()
    assert all(v.dtype == torch.float32 for v in vectors_of(half).values())


def test_a_failing_call_and_the_next_one():
    model = bssn_fast.apply(Rows())
    with pytest.raises(RuntimeError):
        parallel(model, torch.randn(2, 5, 6, 6))
    parallel(model, images(4)).sum().backward()
    before = vectors_of(model)
    model(images())
    assert not same(before, vectors_of(model))


def test_vectors_that_do_not_belong_are_found_in_evaluation():
    model, x = bssn_fast.apply(Rows()), images(4)
    parallel(model, x)
    with torch.no_grad():
        for name in norms(model):
            original(model.get_submodule(name)).normal_()
    found = parallel(model.eval(), x)
    torch.testing.assert_close(found, model(x))


@pytest.mark.parametrize("update", ["forward", "access"])
@pytest.mark.parametrize("training", [True, False])
def test_weights_that_change_before_the_first_use(training, update):
    """Vectors have been sent to other devices before the first look at them."""

    def make():
        torch.manual_seed(0)
        model = bssn_fast.apply(Rows().double(), update=update).train(training)
        with torch.no_grad():
            for name in norms(model):
                original(model.get_submodule(name)).normal_()
        return model

    model, twin, x = make(), make(), images(4, torch.float64)
    torch.testing.assert_close(parallel(model, x), twin(x), rtol=1e-10, atol=1e-10)
    assert same(vectors_of(model), vectors_of(twin))
    before = vectors_of(model)
    torch.testing.assert_close(parallel(model.eval(), x), twin.eval()(x), rtol=1e-10, atol=1e-10)
    assert same(before, vectors_of(model)), "no other look"


@pytest.mark.parametrize("block", [bssn_fast.cached, lambda _: nn.utils.parametrize.cached()])
def test_blocks_are_refused_before_anything_changes(block):
    model = bssn_fast.apply(Rows())
    before = vectors_of(model)
    with pytest.raises(RuntimeError, match=r"first: .*DistributedDataParallel"), block(model):
        parallel(model, images(4))
    assert same(before, vectors_of(model))


def test_nothing_stays_behind():
    model = bssn_fast.apply(Rows())
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    parallel(model, images(4)).sum().backward()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names
    assert all(len(norm.groups) == 1 for norm in norms(model).values())


def test_on_one_device_there_are_no_copies():
    model = bssn_fast.apply(Net())
    nn.DataParallel(model)(images()).sum().backward()
