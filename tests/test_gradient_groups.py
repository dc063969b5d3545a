"""gradient_groups: the same gradients, in several calls, those of the last layers while the backward pass goes on."""

import copy

import pytest
import torch
from support import LAYER_NAMES, Net, assert_same_gradients, gradients, images, norms, original
from torch import nn
from torch.utils.checkpoint import checkpoint

import bssn_fast
from bssn_fast import backends
from bssn_fast.calls.normalizer import _ranges


@pytest.fixture
def backward_calls(monkeypatch):
    """The layers whose gradients the CPU backend is asked for, call by call."""
    backend = backends.get("", torch.device("cpu"))
    backward = backend.backward
    seen: list[list[int]] = []

    def counting(batch, grads, weights, layers, *rest):
        seen.append([weights[j].numel() for j in layers])
        backward(batch, grads, weights, layers, *rest)

    monkeypatch.setattr(backend, "backward", counting)
    return seen


def grouped_copy(model, gradient_groups):
    twin = copy.deepcopy(model)
    return bssn_fast.apply(twin, gradient_groups=gradient_groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient_groups", [2, 3, 99])
def test_same_bits_as_in_one_call(gradient_groups, dtype):
    model = bssn_fast.apply(Net().to(dtype))
    twin = grouped_copy(model, gradient_groups)
    for _ in range(3):
        x, y = images(4, dtype), images(4, dtype)
        for net in (model, twin):
            net.zero_grad()
            (net(x).square().sum() + net(y).sum()).backward()
        for name, grad in gradients(model).items():
            assert torch.equal(grad, gradients(twin)[name]), name
        for p, q in zip(norms(model).values(), norms(twin).values(), strict=True):
            assert all(map(torch.equal, p.buffers(), q.buffers()))


def test_one_forward_and_a_backward_call_for_each_group(launches, backward_calls):
    model = bssn_fast.apply(Net(), gradient_groups=3)
    del launches[:]
    model(images()).sum().backward()
    assert launches == [(5, 1)]
    first, body1, body3, head, embed = [original(model.get_submodule(name)).numel() for name in LAYER_NAMES]
    assert sorted(backward_calls) == sorted([[first], [body1], [body3, head, embed]])


@pytest.mark.parametrize(
    ("gradient_groups", "expected"),
    [(1, "0000"), (2, "0022"), (4, "0123")],
)
def test_gradients_are_ready_while_the_backward_pass_goes_on(gradient_groups, expected):
    """For each layer, how far the backward pass had come when its gradient was there."""
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))
    bssn_fast.apply(model, gradient_groups=gradient_groups)
    reached, ready = "", {}

    def arrive(name):
        nonlocal reached
        reached = name

    for name, layer in model.named_children():
        layer.register_full_backward_pre_hook(lambda *_, name=name: arrive(name))
        original(layer).register_post_accumulate_grad_hook(lambda _, name=name: ready.update({name: reached}))
    model(torch.randn(2, 6, requires_grad=True)).sum().backward()
    assert "".join(ready[name] for name in "0123") == expected


def test_frozen_and_unused_layers():
    model = bssn_fast.apply(Net(), gradient_groups=99)
    original(model.body[1]).requires_grad_(False)
    twin = grouped_copy(model, 1)
    x = images()
    for net in (model, twin):
        net.head(net.body(net.first(x)).flatten(1)).sum().backward()
    assert_same_gradients(model, twin, 0)
    assert original(model.body[1]).grad is None
    assert original(model.embed).grad is None
    assert original(model.first).grad is not None


def test_gradients_of_gradients():
    model = bssn_fast.apply(Net().double(), gradient_groups=2)
    twin = grouped_copy(model, 1)
    x = images(2, torch.float64)
    for net in (model, twin):
        weights = [original(net.get_submodule(name)) for name in LAYER_NAMES]
        grads = torch.autograd.grad(net(x).square().sum(), weights, create_graph=True)
        sum(g.square().sum() for g in grads).backward()
    assert_same_gradients(model, twin, 1e-12)


def test_evaluation_and_cached():
    model = bssn_fast.apply(Net(), gradient_groups=2)
    twin = grouped_copy(model, 1)
    x = images()
    for net in (model, twin):
        with bssn_fast.cached(net):
            (net(x).sum() + net(2 * x).square().sum()).backward()
        net.eval()
        net(x).sum().backward()
        net(x).square().sum().backward()
    assert_same_gradients(model, twin, 0)


def test_checkpoint_of_a_forward_that_left_a_group_unused():
    """Its graph is gone, the other's is not: the vectors of the forward in between would be wrong."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, whole):
            return checkpoint(self.second, self.first(x) if whole else x, use_reentrant=False)

    model = bssn_fast.apply(Pair(), gradient_groups=2)
    x = torch.randn(2, 4, requires_grad=True)
    loss = model(x, False).sum()
    model(x, True)
    with pytest.raises(RuntimeError, match="cached"):
        loss.backward()


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_bad_numbers_are_refused(count):
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="gradient_groups must be a whole number"):
        bssn_fast.apply(model, gradient_groups=count)
    assert not hasattr(model, "parametrizations")


@pytest.mark.parametrize(
    ("sizes", "count", "lengths"),
    [
        ([1, 1, 1, 1], 2, [2, 2]),
        ([1, 1, 1, 100], 2, [3, 1]),
        ([100, 1, 1, 1], 2, [1, 3]),
        ([5], 4, [1]),
        ([3, 3, 3], 99, [1, 1, 1]),
    ],
)
def test_ranges_are_of_equal_size_as_far_as_layers_allow(sizes, count, lengths):
    ranges = _ranges(sizes, count)
    assert [len(sizes[r]) for r in ranges] == lengths
    assert [r.start for r in ranges] == [0, *(r.stop for r in ranges[:-1])]
