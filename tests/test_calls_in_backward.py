"""A backward pass that calls the model again, without torch's checkpoint: adjoint solvers, reversible blocks, hooks."""

import warnings

import pytest
import torch
from support import Net, plain_copy, same, vectors_of
from test_checkpoint import compare, data

import bssn_fast


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


@pytest.mark.parametrize("update", ["forward", "access"])
def test_warning_where_it_is_not_known_which_forward_is_meant(update):
    model = bssn_fast.apply(Net().double(), update=update)
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
