"""Ways to compile a model, and a twin that is not compiled, for the tests of torch.compile."""

import contextlib
import copy

import pytest
import torch
from support import Net, assert_same_gradients, norms, original, same, vectors_of
from torch._dynamo.utils import counters

import bssn_fast


@contextlib.contextmanager
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")


def compiled(function, backend="aot_eager", fullgraph=True):
    return torch.compile(function, backend=backend, fullgraph=fullgraph)


def as_model(model, **options):
    """Compiled as a module: torch runs the module's hooks outside of what it compiles."""
    return compiled(model, **options)


def as_part(model, **options):
    """Called by a function that is compiled: the hooks become part of its graph."""
    return compiled(lambda *args: model(*args), **options)


def keeps_reasons():
    """Whether what code says when it raises an exception while it is compiled reaches the user: not with torch 2.6."""

    def refuse(x):
        raise RuntimeError("the reason")

    try:
        compiled(lambda x: refuse(x))(torch.ones(1))
    except Exception as error:
        return "the reason" in str(error)


both_ways = pytest.mark.parametrize("ways", [as_model, as_part])


def twins(net=None, **settings):
    model = bssn_fast.apply(Net() if net is None else net, **settings)
    return model, copy.deepcopy(model)


def change_weights(*models):
    """As an optimizer would, and more."""
    with torch.no_grad():
        for model in models:
            for norm in norms(model):
                original(model.get_submodule(norm)).mul_(1.2).add_(0.01)


def assert_twins(model, twin, rtol=0.0):
    assert same(vectors_of(model), vectors_of(twin))
    assert_same_gradients(model, twin, rtol)
