"""Gradients of whole models: any mix of forwards before one backward, penalties, frozen and unused layers."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from support import (
    LAYER_NAMES,
    VARIANTS,
    Net,
    assert_same_gradients,
    images,
    norm_of,
    original,
    plain_copy,
    same,
    vectors_of,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import bssn_fast
from bssn_fast.calls.normalizer import _Attach

MODES = ("train", "eval", "no_grad", "cached")


def forward(model, mode, cached):
    """A loss of the model in some mode; `cached` is the context in which forwards share their weights."""
    model.train(mode != "eval")
    x, y = images(2, torch.float64), images(3, torch.float64)
    if mode == "no_grad":
        with torch.no_grad():
            return model(x).sum()
    if mode == "cached":
        with cached():
            return model(x).square().sum() + model(y).sum()
    return model(x).square().sum()


def run(model, modes, cached):
    torch.manual_seed(1)
    losses = [forward(model, mode, cached) for mode in modes]
    if any(x.requires_grad for x in losses):
        sum(losses).backward()
    return [x.detach() for x in losses]


@pytest.mark.parametrize(
    ("variant", "modes"),
    [
        *itertools.product(VARIANTS, itertools.product(MODES, repeat=2)),
        *(("bssn", modes) for modes in itertools.product(MODES, repeat=3)),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_forwards_before_one_backward(variant, modes):
    """The same as the sum over graphs that share nothing but what `cached` shares: those of plain torch operations."""
    model = bssn_fast.apply(Net().double(), variant)
    twin = plain_copy(model)
    ours, theirs = run(model, modes, lambda: bssn_fast.cached(model)), run(twin, modes, parametrize.cached)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=0)
    assert_same_gradients(model, twin, 1e-10)
    for name in LAYER_NAMES:
        found, expected = (norm_of(net.get_submodule(name)) for net in (model, twin))
        torch.testing.assert_close(tuple(found.buffers()), expected.vectors, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("penalty", ["r1", "wgan_gp"])
@pytest.mark.parametrize("share", [False, True])
def test_discriminator_step_with_penalty(variant, penalty, share):
    model = bssn_fast.apply(Net().double(), variant)
    twin = plain_copy(model)

    def step(net, context):
        torch.manual_seed(2)
        real, fake = images(3, torch.float64), images(3, torch.float64)
        with context():
            loss = torch.relu(1 - net(real)).mean() + torch.relu(1 + net(fake)).mean()
            if penalty == "r1":
                points = real.requires_grad_()
            else:
                mix = torch.rand(3, 1, 1, 1, dtype=torch.float64)
                points = (mix * real + (1 - mix) * fake).requires_grad_()
            (grad,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
            norm = grad.flatten(1).square().sum(1)
            loss = loss + 10 * (norm.mean() if penalty == "r1" else (norm.sqrt() - 1).square().mean())
        loss.backward()
        return loss.detach()

    ours = step(model, (lambda: bssn_fast.cached(model)) if share else nullcontext)
    theirs = step(twin, parametrize.cached if share else nullcontext)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=0)
    assert_same_gradients(model, twin, 1e-9)


def test_gradients_of_gradients_of_the_weights():
    """A penalty on dL/dW itself, whose graph leads through our backward."""
    model = bssn_fast.apply(Net().double())
    twin = plain_copy(model)
    x = images(2, torch.float64)
    for net in (model, twin):
        weights = [original(net.get_submodule(n)) for n in LAYER_NAMES]
        grads = torch.autograd.grad(net(x).square().sum(), weights, create_graph=True)
        sum(g.square().sum() for g in grads).backward()
    assert_same_gradients(model, twin, 1e-9)


def graph_nodes(tensor):
    found, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [n for n, _ in node.next_functions]
    return found


def test_frozen_model_builds_no_graph_for_the_normalisation():
    model = bssn_fast.apply(Net())
    x = images().requires_grad_()
    name = _Attach._backward_cls.__name__
    assert any(type(n).__name__ == name for n in graph_nodes(model(x)))
    model.requires_grad_(False)
    before = vectors_of(model)
    out = model(x)
    assert not any(type(n).__name__ == name for n in graph_nodes(out))
    assert not same(before, vectors_of(model))  # it iterates nevertheless, as torch does
    out.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in model.parameters())
    assert not model.first.weight.requires_grad
    model.requires_grad_(True)
    model(x).sum().backward()
    assert all(original(model.get_submodule(n)).grad is not None for n in LAYER_NAMES)


def test_partially_frozen():
    model = bssn_fast.apply(Net().double())
    model.first.requires_grad_(False)
    original(model.head).requires_grad_(False)
    twin = plain_copy(model)
    twin.first.requires_grad_(False)
    original(twin.head).requires_grad_(False)
    x = images(2, torch.float64)
    for net in (model, twin):
        net(x).square().sum().backward()
    assert original(model.first).grad is None
    assert original(model.head).grad is None
    assert_same_gradients(model, twin, 1e-10)


def test_layers_that_the_forward_does_not_use():
    """Their gradients are None, not 0: optimizers tell the difference."""

    class Partial(Net):
        def forward(self, x):
            return self.first(x)

    model = bssn_fast.apply(Partial().double())
    twin = plain_copy(model)
    x = images(2, torch.float64)
    for net in (model, twin):
        net(x).square().sum().backward()
    assert all(original(model.get_submodule(n)).grad is None for n in LAYER_NAMES if n != "first")
    assert_same_gradients(model, twin, 1e-10)


def test_gradients_accumulate_and_outlive_the_next_step():
    """Gradients lie in buffers that are used again only when no one holds them any more."""
    model = bssn_fast.apply(Net().double())
    twin = plain_copy(model)
    kept = []
    for _ in range(3):
        x = images(2, torch.float64)
        for net in (model, twin):
            net(x).sum().backward()
        kept.append([(p.grad, p.grad.clone()) for p in model.parameters()])
        assert_same_gradients(model, twin, 1e-10)
    for net in (model, twin):
        net.zero_grad(set_to_none=True)
    for _ in range(3):
        model(images(2, torch.float64)).sum().backward()
        model.zero_grad(set_to_none=True)
    last = [(grad, copy) for grad, copy in kept[-1]]
    assert all(torch.equal(grad, copy) for grad, copy in last)


def test_normalised_weights_that_are_held_stay_as_they_are():
    model = bssn_fast.apply(Net())
    held = []
    for training in (True, True, False, False, True):
        model.train(training)
        with torch.no_grad():
            model(images())
            weight = model.first.weight
        held.append((weight, weight.clone()))
        with torch.no_grad():
            original(model.first).add_(torch.randn(8, 3, 3, 3))
    assert all(torch.equal(a, b) for a, b in held)


def test_channels_last_model():
    model = bssn_fast.apply(Net().double().to(memory_format=torch.channels_last))
    twin = plain_copy(model)
    x = images(2, torch.float64).contiguous(memory_format=torch.channels_last)
    for net in (model, twin):
        net(x).square().sum().backward()
    assert original(model.first).grad.stride() == original(model.first).stride()
    assert_same_gradients(model, twin, 1e-10)


class Island(Net):
    """Parts that must not run in autocast's dtype."""

    peek = False

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            x = self.first(x)
        if self.peek:
            self.seen = self.body[1].weight.dtype, self.embed.weight.dtype
        x = self.body(x).tanh().flatten(1)
        with torch.autocast("cpu", enabled=False):
            x = x.to(self.head.bias.dtype)
            return self.head(x) + (self.embed(torch.arange(len(x))) * x).sum(1, keepdim=True)


@pytest.mark.parametrize("backend", ["reference", ""])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend):
    """Normalised weights come in autocast's dtype where it applies, gradients and vectors do not."""
    model = bssn_fast.apply(Island(), backend=backend)
    model.peek = True
    twin = plain_copy(model)
    twin.peek = False
    exact = copy.deepcopy(twin).double()
    x = images()
    with torch.autocast("cpu", dtype=dtype):
        losses = [net(x).square().sum() for net in (model, twin)]
    losses.append(exact(x.double()).square().sum())
    for loss in losses:
        loss.backward()
    assert model.seen == (dtype, torch.float32)
    for name in LAYER_NAMES:
        found, plain, truth = (original(net.get_submodule(name)).grad for net in (model, twin, exact))
        assert found.dtype == torch.float32
        assert (found - truth).norm() <= 1.5 * (plain - truth).norm() + 1e-6 * truth.norm(), name
        ours, expected = norm_of(model.get_submodule(name)), norm_of(twin.get_submodule(name))
        torch.testing.assert_close(tuple(ours.buffers()), expected.vectors)  # also: one iteration, not two


class Writing(Net):
    """Writes into the weights that it computes with."""

    def forward(self, x):
        written = self.first.weight.mul_(3).square().sum()
        return super().forward(x) + written


@pytest.mark.parametrize("gradient_groups", [1, 99])
@pytest.mark.parametrize("names", [None, ["first"]])
def test_weights_written_to_in_the_models_forward(gradient_groups, names):
    """An operation like any other, which nobody else sees, as in torch; also of a layer that is alone in its call."""
    model = bssn_fast.apply(Writing().double(), names=names, gradient_groups=gradient_groups)
    model.eval()  # in training, a second look at a weight would iterate in torch
    plain = plain_copy(model)
    x = images(2, torch.float64)
    for _ in range(2):
        found, expected = model(x), plain(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        found.sum().backward(), expected.sum().backward()
        assert_same_gradients(model, plain, 1e-9)


def test_shared_weights_cannot_be_written_to_differentiably():
    model = bssn_fast.apply(Net())
    with bssn_fast.cached(model):
        model(images())
        with pytest.raises(RuntimeError, match="modified inplace"):
            model.head.weight.mul_(2)


@pytest.mark.parametrize("change", [lambda w: w.contiguous(memory_format=torch.channels_last), lambda w: w[:1]])
def test_weights_laid_out_anew_before_the_backward_pass_are_refused(change):
    """Through `.data`, of which torch takes no notice."""
    model = bssn_fast.apply(Net())
    loss = model(images()).sum()
    weight = original(model.body[1])
    weight.data = change(weight.data)
    with pytest.raises(RuntimeError, match="another shape, precision"):
        loss.backward()


@pytest.mark.parametrize(
    "hooks", [nullcontext, lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)]
)
def test_weights_changed_before_the_backward_pass_are_refused(hooks):
    """Also where hooks see what is saved, as in a checkpoint: torch itself does not look then."""
    model = bssn_fast.apply(Net())
    with hooks():
        loss = model(images()).sum()
    with torch.no_grad():
        original(model.body[1]).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Embeddings(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.first, self.second = nn.Embedding(7, 4, sparse=sparse), nn.EmbeddingBag(6, 4, mode="sum", sparse=sparse)
        self.last = nn.Linear(4, 3)

    def forward(self, i):
        return self.last(self.first(i).sum(1) * self.second(i))


@pytest.mark.parametrize("kind", ["torch", "forward", "access", "groups"])
def test_sparse_gradients_of_embeddings(kind):
    """Of the normalised weights: those of the weights before are dense, as with torch's norm."""
    models = [Embeddings(sparse).double() for sparse in (True, False)]
    i = torch.tensor([[1, 1], [5, 3]])
    for model in models:
        if kind == "torch":
            for layer in (model.first, model.second, model.last):
                parametrizations.spectral_norm(layer)
        else:
            settings = {"gradient_groups": 2} if kind == "groups" else {"update": kind}
            bssn_fast.apply(model, "sn", names=["first", "second.weight", "last"], **settings)
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        for _ in range(2):
            model.zero_grad()
            model(i).square().sum().backward()
        if kind != "torch":
            (grad,) = torch.autograd.grad(model(i).sum(), original(model.first), create_graph=True)
            grad.square().sum().backward()
    assert not original(models[0].first).grad.is_sparse
    assert_same_gradients(*models, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layers", [["body.1"], [""]])
def test_another_precision_before_the_backward_pass_is_refused(layers, dtype):
    model = bssn_fast.apply(Net())
    loss = model(images()).sum()
    for name in layers:
        model.get_submodule(name).to(dtype)
    with pytest.raises(RuntimeError, match="another shape, precision"):
        loss.backward()


def test_strides_that_mean_nothing_may_change_before_the_backward_pass():
    model = bssn_fast.apply(nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 3, 1)).double())
    twin, x = copy.deepcopy(model), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    loss, expected = model(x).square().sum(), twin(x).square().sum()
    before = original(model[0]).stride()
    model.to(memory_format=torch.channels_last)
    assert original(model[0]).stride() != before
    loss.backward(), expected.backward()
    assert_same_gradients(model, twin, 1e-12)
