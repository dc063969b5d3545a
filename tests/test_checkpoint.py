"""torch.utils.checkpoint repeats a forward in the backward pass: no second iteration, the same gradients."""

import copy
import warnings

import pytest
import torch
from support import Net, assert_same_gradients, images, norms, plain_copy, same, vectors_of
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

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


class Adjoint(torch.autograd.Function):
    """Calls the model again in its backward pass, as an adjoint solver of differential equations does."""

    @staticmethod
    def forward(ctx, model, x):
        ctx.model = model
        ctx.save_for_backward(x)
        return model(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.model(x).backward(grad)
        return None, x.grad


def test_a_model_that_is_called_in_a_backward_pass(recwarn):
    model = bssn_fast.apply(Net().double())
    twin = plain_copy(model)
    (x,) = data()
    vectors = []

    def run():
        out = Adjoint.apply(model, x).square().sum()
        vectors.append(vectors_of(model))
        out.backward()

    compare(model, twin, run, lambda: twin(x).square().sum().backward())
    assert same(vectors[0], vectors_of(model))  # it is not a step of training
    assert not recwarn


def test_each_function_finds_the_vectors_of_its_own_forward(recwarn):
    """Whatever was trained before, and whatever forwards came between."""
    model = bssn_fast.apply(Net().double())
    twin = plain_copy(model)
    x, y, z = data(3)

    def run(net, adjoint):
        for _ in range(3):
            net(z).sum().backward()
        loss = adjoint(net, x).square().sum() - adjoint(net, y).sum()
        with torch.no_grad():
            net(z)
        net.zero_grad()
        loss.backward()

    compare(model, twin, lambda: run(model, Adjoint.apply), lambda: run(twin, lambda net, x: net(x)))
    assert not recwarn


def test_a_function_around_a_part_of_the_model(recwarn):
    """As reversible blocks are made."""

    class Reversible(Net):
        plain = False

        def forward(self, x):
            x = self.first(x)
            x = (self.body(x) if self.plain else Adjoint.apply(self.body, x)).tanh().flatten(1)
            return self.head(x) + (self.embed.weight[0] * x).sum()

    model = bssn_fast.apply(Reversible().double())
    twin = plain_copy(model)
    twin.plain = True
    inputs = data(3)
    compare(
        model,
        twin,
        lambda: sum(model(x).square().sum() for x in inputs).backward(),
        lambda: sum(twin(x).square().sum() for x in inputs).backward(),
    )
    assert not recwarn


def test_a_function_with_several_forwards_of_one_normalisation(recwarn):
    """An adjoint solver in `cached`, which goes back in another order."""

    class Solver(Adjoint):
        @staticmethod
        def forward(ctx, model, x):
            model(2 * x)
            return Adjoint.forward(ctx, model, x)

    model = bssn_fast.apply(Net().double())
    twin = plain_copy(model)
    x, y = data(2)

    def run():
        with bssn_fast.cached(model):
            loss = Solver.apply(model, x).square().sum()
        model(y)
        loss.backward()

    def run_plain():
        loss = twin(x).square().sum()
        twin(y)
        loss.backward()

    compare(model, twin, run, run_plain)
    assert not recwarn


def test_warning_where_it_is_not_known_which_forward_is_meant():
    model = bssn_fast.apply(Net().double())
    x, y = data(2)

    def ask(grad):
        with torch.enable_grad():
            model(x.detach()).sum().backward()

    def call(z):
        out = model(z)
        out.register_hook(ask)
        return out.sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(x).backward()
    with pytest.warns(UserWarning, match="latest forward") as caught:
        (call(x) + call(y)).backward()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        (call(x) + call(y)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_warning_where_a_function_has_several_forwards():
    class Solver(Adjoint):
        @staticmethod
        def forward(ctx, model, x):
            return Adjoint.forward(ctx, model, x + 0 * model(x).sum())

    model = bssn_fast.apply(Net().double())
    (x,) = data()
    with pytest.warns(UserWarning, match="latest forward"):
        Solver.apply(model, x).sum().backward()


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
