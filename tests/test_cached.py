"""`cached`: forwards that share one normalisation. Its gradients are tested with all others in test_gradients.py."""

import pytest
import torch
from support import LAYER_NAMES, Net, images, in_use, norm_of, norms, original, plain_copy, same, vectors_of
from torch import nn

import bssn_fast
from bssn_fast.modules import sharing


@pytest.fixture
def model():
    return bssn_fast.apply(Net())


def total(launches):
    return sum(n for n, _ in launches)


def test_one_normalisation_for_the_block(model, launches):
    launches.clear()
    with bssn_fast.cached(model):
        first = model(images()), model.first.weight
        vectors = vectors_of(model)
        second = model(images()), model.first.weight
        model.head(torch.randn(1, 64))
        assert first[1] is second[1]
    assert total(launches) == len(LAYER_NAMES)
    assert same(vectors, vectors_of(model))
    model(images())
    assert total(launches) == 2 * len(LAYER_NAMES)
    assert not same(vectors, vectors_of(model))


@pytest.mark.parametrize("of_torch", [False, True])
@pytest.mark.parametrize("use", ["model", "layer", "functional_call"])
def test_each_block_has_an_iteration_of_its_own(model, of_torch, use):
    """A training loop has a block in each step."""
    twin, x = plain_copy(model), images()
    calls = {
        "model": lambda net: net(x),
        "layer": lambda net: net.head.weight,
        "functional_call": lambda net: torch.func.functional_call(net, dict(net.named_parameters()), (x,)),
    }
    for _ in range(3):
        with nn.utils.parametrize.cached() if of_torch else bssn_fast.cached(model):
            for _ in range(2):
                calls[use](model)
        with nn.utils.parametrize.cached():
            calls["model" if use == "functional_call" else use](twin)
        for name, norm in norms(model).items():
            torch.testing.assert_close(tuple(norm.buffers()), norms(twin)[name].vectors)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("outer", ["torch", "ours"])
def test_the_outermost_block_counts(model, outer, before, launches):
    def of_torch():
        return nn.utils.parametrize.cached()

    def ours():
        return bssn_fast.cached(model)

    first, second = (of_torch, ours) if outer == "torch" else (ours, of_torch)
    for _ in range(2):
        launches.clear()
        with first():
            if before:
                model(images())
            with second():
                model(images()), model(images())
            model(images())
        assert total(launches) == len(LAYER_NAMES)
    with second():
        model(images()), model(images())
    assert total(launches) == 2 * len(LAYER_NAMES)


def test_results_from_before_are_not_used_inside(model):
    before = vectors_of(model)
    model(images())
    middle = vectors_of(model)
    with bssn_fast.cached(model):
        model(images())
        inside = vectors_of(model)
    assert not same(before, middle)
    assert not same(middle, inside)


def test_without_gradients_first(model, launches):
    launches.clear()
    with bssn_fast.cached(model):
        with torch.no_grad():
            a = model(images())
        vectors = vectors_of(model)
        b = model(images())
        b.sum().backward()
    assert not a.requires_grad
    assert all(original(model.get_submodule(n)).grad is not None for n in LAYER_NAMES)
    assert same(vectors, vectors_of(model))
    assert total(launches) == len(LAYER_NAMES)


def test_without_gradients_first_and_some_layers_frozen(model):
    original(model.first).requires_grad_(False)
    with bssn_fast.cached(model):
        with torch.no_grad():
            model(images())
        vectors = vectors_of(model)
        model(images()).sum().backward(retain_graph=True)
        model.head(torch.randn(1, 64)).sum().backward()
    assert same(vectors, vectors_of(model))
    assert original(model.head).grad is not None


def test_first_read_alone_then_in_a_call(model):
    with bssn_fast.cached(model):
        with torch.no_grad():
            model.first(images())
        before = vectors_of(model)
        model(images()).sum().backward()
        after = vectors_of(model)
    assert all(torch.equal(before[k], after[k]) == k.startswith("first.") for k in ("first._u", "body.1._u"))


@pytest.mark.parametrize("training", [False, True])
def test_a_weight_that_changes_is_normalised_anew(model, training):
    model.train(training)
    with bssn_fast.cached(model), torch.no_grad():
        x = images()
        before = model(x)
        vectors = {n: [b.clone() for b in p.buffers()] for n, p in norms(model).items()}
        original(model.first).add_(torch.randn(8, 3, 3, 3), alpha=1e-3)  # the vectors still belong
        after = model(x)
        assert not torch.equal(before, after)
        for name in LAYER_NAMES:  # the others are what they were
            changed = not all(map(torch.equal, vectors[name], norm_of(model.get_submodule(name)).buffers()))
            assert changed == (training and name == "first")


def test_optimizer_step_inside(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bssn_fast.cached(model):
        for _ in range(3):
            before = original(model.first).detach().clone()
            model(images()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert not torch.equal(before, original(model.first))


def test_one_graph_for_all(model):
    """Two backward passes need `retain_graph`, as wherever a graph is shared."""
    with bssn_fast.cached(model):
        model(images()).sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            model(images()).sum().backward()
    model.zero_grad()
    with bssn_fast.cached(model):
        model(images()).sum().backward(retain_graph=True)
        model(images()).sum().backward()


def test_nested_and_left_by_an_error(model, launches):
    launches.clear()

    def fail():
        with bssn_fast.cached(model):
            model(images())
            with bssn_fast.cached(model):
                model(images())
            model(images())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert total(launches) == len(LAYER_NAMES)
    assert not sharing.any_block()
    assert in_use(model) == []
    model(images())
    assert total(launches) == 2 * len(LAYER_NAMES)


def test_part_of_a_model(model, launches):
    launches.clear()
    with bssn_fast.cached(model.body):
        model(images())
        model(images())
    assert total(launches) == 2 + 3 * 2


def test_inside_a_forward(launches):
    class Inner(Net):
        def forward(self, x):
            with bssn_fast.cached(self):
                self.first(x)
            return super().forward(x)

    model = bssn_fast.apply(Inner())
    launches.clear()
    model(images()).sum().backward()
    assert total(launches) == len(LAYER_NAMES)
    assert in_use(model) == []


def test_with_update_access(launches):
    model = bssn_fast.apply(Net(), update="access")
    launches.clear()
    with bssn_fast.cached(model):
        model(images()), model(images())
    assert total(launches) == len(LAYER_NAMES)
    model(images())
    assert total(launches) == 2 * len(LAYER_NAMES)


def test_new_settings_inside_hold_at_once():
    layer = bssn_fast.apply(nn.Linear(4, 4), "ssn", scale=1.0)
    with bssn_fast.cached(layer), torch.no_grad():
        before = layer.weight.norm()
        bssn_fast.apply(layer, "ssn", scale=10.0)
        torch.testing.assert_close(layer.weight.norm(), 10 * before, rtol=0.5, atol=0)
