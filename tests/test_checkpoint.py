"""torch.utils.checkpoint repeats a forward in the backward pass: no second iteration, the same gradients."""

import copy
from functools import partial

import pytest
import torch
from support import Net, assert_same_gradients, images, norms, plain_copy, same, vectors_of
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, checkpoint_sequential
from torch.utils.checkpoint import create_selective_checkpoint_contexts as selective

import bssn_fast

both_modes = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
both_updates = pytest.mark.parametrize("update", ["forward", "access"])


class Parts(Net):
    """Checkpoints around parts of the forward."""

    use_reentrant: bool | None = None

    def forward(self, x):
        if self.use_reentrant is None:
            return super().forward(x)
        x = self.first(x)
        x = checkpoint(self.body, x, use_reentrant=self.use_reentrant).tanh().flatten(1)
        labels = torch.arange(len(x)) % 3
        scores = checkpoint(self.head, x, use_reentrant=self.use_reentrant)
        return scores + (self.embed(labels) * x).sum(1, keepdim=True)


def data(n=1):
    return [images(2, torch.float64).requires_grad_() for _ in range(n)]


def compare(model, plain, run, run_plain):
    """Gradients and vectors as those of plain operations without a checkpoint."""
    run(), run_plain()
    assert_same_gradients(model, plain, 1e-10)
    for name, norm in norms(model).items():
        expected = norms(plain)[name].vectors
        torch.testing.assert_close(tuple(norm.buffers()), expected, rtol=1e-10, atol=1e-12)


def twin_of(model):
    twin = plain_copy(model)
    twin.use_reentrant = None
    return twin


@both_modes
@both_updates
def test_parts(use_reentrant, update):
    model = bssn_fast.apply(Parts().double(), update=update)
    model.use_reentrant = use_reentrant
    twin = twin_of(model)
    for x in data(3):
        compare(
            model, twin, lambda x=x: model(x).square().sum().backward(), lambda x=x: twin(x).square().sum().backward()
        )


OPERATIONS = {
    "layers": [torch.ops.aten.convolution.default, torch.ops.aten.addmm.default],
    "others": [torch.ops.aten.tanh.default, torch.ops.aten.mul.Tensor, torch.ops.aten.view.default],
    "all": [],
}


@both_updates
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("saved", OPERATIONS)
def test_selective(update, training, whole, saved):
    """These count the operations between the beginning and the end, by name."""
    save, counted = OPERATIONS[saved], []

    def policy(context, operation, *args, **kwargs):
        counted.append(str(operation))
        return CheckpointPolicy.MUST_SAVE if not save or operation in save else CheckpointPolicy.PREFER_RECOMPUTE

    class Selective(Net):
        whole: bool | None = None

        def forward(self, x):
            if self.whole is not False:
                return super().forward(x)
            run = partial(checkpoint, use_reentrant=False, context_fn=partial(selective, policy))
            x = run(lambda x: self.body(self.first(x) * 2), x).tanh().flatten(1)
            return run(lambda x: self.head(x * x) + self.embed(torch.arange(len(x)) % 3).sum() * x.sum(), x)

    model = bssn_fast.apply(Selective().double(), update=update).train(training)
    model.whole = whole
    call = model
    if whole:
        call = partial(checkpoint, model, use_reentrant=False, context_fn=partial(selective, policy))
    twin = plain_copy(model)
    for x in data(3):
        compare(
            model,
            twin,
            lambda x=x: (call(x).square().sum() + call(2 * x).sum()).backward(),
            lambda x=x: (uncheckpointed(twin, x).square().sum() + uncheckpointed(twin, 2 * x).sum()).backward(),
        )
        model.zero_grad(), twin.zero_grad()
    assert not [name for name in counted if "bssn_fast" in name or "norm" in name]


def uncheckpointed(twin, x):
    if twin.whole:
        return twin(x)
    x = twin.body(twin.first(x) * 2).tanh().flatten(1)
    return twin.head(x * x) + twin.embed(torch.arange(len(x)) % 3).sum() * x.sum()


@both_modes
@both_updates
def test_whole_model(use_reentrant, update):
    model = bssn_fast.apply(Net().double(), update=update)
    twin = twin_of(model)
    for x in data(3):
        compare(
            model,
            twin,
            lambda x=x: checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward(),
            lambda x=x: twin(x).square().sum().backward(),
        )


@both_modes
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["backward_after", "backward_inside"])
def test_several_forwards_share_one_normalisation_in_cached(use_reentrant, whole, inside):
    model = bssn_fast.apply(Parts().double())
    model.use_reentrant = None if whole else use_reentrant
    twin = twin_of(model)
    x, y = data(2)
    call = (lambda z: checkpoint(model, z, use_reentrant=use_reentrant)) if whole else model

    def run():
        with bssn_fast.cached(model):
            loss = call(x).square().sum() + call(y).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()

    def run_plain():
        with nn.utils.parametrize.cached():
            (twin(x).square().sum() + twin(y).sum()).backward()

    compare(model, twin, run, run_plain)


@both_modes
@both_updates
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("n", [2, 3])
def test_several_forwards_before_one_backward(use_reentrant, update, whole, n):
    """Each is repeated with its own vectors."""
    model = bssn_fast.apply(Parts().double(), update=update)
    model.use_reentrant = None if whole else use_reentrant
    twin = twin_of(model)
    call = (lambda z: checkpoint(model, z, use_reentrant=use_reentrant)) if whole else model
    inputs = data(n)
    compare(
        model,
        twin,
        lambda: sum(call(x).square().sum() for x in inputs).backward(),
        lambda: sum(twin(x).square().sum() for x in inputs).backward(),
    )


@both_modes
@both_updates
def test_a_function_with_several_calls_of_the_model(use_reentrant, update):
    model = bssn_fast.apply(Parts().double(), update=update)
    model.use_reentrant = None
    twin = twin_of(model)
    x, y, z = data(3)

    def twice(net):
        return lambda x, y: net(x).square().sum() - net(y).square().sum()

    def run():
        loss = checkpoint(twice(model), x, y, use_reentrant=use_reentrant)
        (loss + checkpoint(twice(model), z, x, use_reentrant=use_reentrant)).backward()

    compare(model, twin, run, lambda: (twice(twin)(x, y) + twice(twin)(z, x)).backward())


@both_updates
def test_checkpoints_inside_a_checkpoint(update):
    model = bssn_fast.apply(Parts().double(), update=update)
    model.use_reentrant = False
    twin = twin_of(model)
    inputs = data(3)
    compare(
        model,
        twin,
        lambda: sum(checkpoint(model, x, use_reentrant=False).square().sum() for x in inputs).backward(),
        lambda: sum(twin(x).square().sum() for x in inputs).backward(),
    )


@both_modes
def test_layers_that_are_used_alone(use_reentrant):
    """Nobody calls the model; several samples, one backward pass."""
    model = bssn_fast.apply(Net().double())
    twin = plain_copy(model)
    inputs = data(3)

    def loss(net, x, f):
        return f(net.body, f(net.first, x)).square().sum()

    def repeated(part, x):
        return checkpoint(part, x, use_reentrant=use_reentrant)

    compare(
        model,
        twin,
        lambda: sum(loss(model, x, repeated) for x in inputs).backward(),
        lambda: sum(loss(twin, x, lambda part, x: part(x)) for x in inputs).backward(),
    )


@both_modes
def test_vectors_changed_since_by_a_forward_without_gradients(use_reentrant):
    model = bssn_fast.apply(Parts().double())
    model.use_reentrant = use_reentrant
    twin = twin_of(model)
    (x,) = data()

    def run(net):
        loss = net(x).square().sum()
        with torch.no_grad():
            net(x)
        loss.backward()

    compare(model, twin, lambda: run(model), lambda: run(twin))


@both_modes
def test_evaluation_between_forward_and_backward(use_reentrant):
    model = bssn_fast.apply(Parts().double())
    model.use_reentrant = use_reentrant
    twin = twin_of(model)
    (x,) = data()

    def run():
        loss = model(x).square().sum()
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()
        loss.backward()

    compare(model, twin, run, lambda: twin(x).square().sum().backward())


@both_modes
def test_steps_without_checkpoint_before(use_reentrant):
    """Forwards whose backward pass is over, or whose results are gone, are not meant any more."""
    model = bssn_fast.apply(Parts().double())
    losses = []
    for x in data(3):
        model.use_reentrant = None
        model(x)  # only to look at its shape
        losses.append(model(x).sum())
        losses[-1].backward()
    model.zero_grad()
    twin = twin_of(model)
    model.use_reentrant = use_reentrant
    (x,) = data()
    compare(model, twin, lambda: model(x).square().sum().backward(), lambda: twin(x).square().sum().backward())


@both_modes
def test_frozen_discriminator(use_reentrant):
    """The generator's step: gradients pass through, none for the weights."""
    model = bssn_fast.apply(Parts().double())
    model.requires_grad_(False)
    model.use_reentrant = use_reentrant
    twin = twin_of(model)
    twin.requires_grad_(False)
    for (x,) in (data(), data()):
        (found,) = torch.autograd.grad(model(x).square().sum(), x) if not use_reentrant else by_backward(model, x)
        (expected,) = torch.autograd.grad(twin(x).square().sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def by_backward(model, x):
    x = x.detach().requires_grad_()
    model(x).square().sum().backward()
    return (x.grad,)


@both_modes
def test_checkpoint_sequential(use_reentrant):
    layers = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(6, 6), nn.Tanh()))).double()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x, plain=False):
            return self.layers(x) if plain else checkpoint_sequential(self.layers, 3, x, use_reentrant=use_reentrant)

    model = bssn_fast.apply(Model())
    twin = plain_copy(model)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    compare(
        model, twin, lambda: model(x).square().sum().backward(), lambda: twin(x, plain=True).square().sum().backward()
    )


@both_modes
def test_evaluation_mode(use_reentrant):
    model = bssn_fast.apply(Parts().double()).eval()
    model.use_reentrant = use_reentrant
    before = vectors_of(model)
    twin = twin_of(copy.deepcopy(model))
    (x,) = data()
    compare(model, twin, lambda: model(x).square().sum().backward(), lambda: twin(x).square().sum().backward())
    assert same(before, vectors_of(model))
