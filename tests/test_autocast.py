"""Autocast switched on and off between calls, for models in which not all layers follow it: embeddings do not."""

import contextlib

import pytest
import torch
from support import Net, assert_same_gradients, images, norms, plain_copy
from torch import nn

import bssn_fast
from bssn_fast.modules import group

ON_AND_OFF = [False, True, True, False, True, False, False]


def autocast(on, dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype, enabled=on)


def weights_in_call(model, on, x):
    """The layers' weights in a call of the model with autocast or without, by name."""
    seen = {}
    with contextlib.ExitStack() as stack:
        for name in norms(model):
            hook = model.get_submodule(name).register_forward_hook(
                lambda m, args, out, name=name: seen.update({name: m.weight})
            )
            stack.callback(hook.remove)
        with autocast(on):
            model(x)
    return seen


def check_weights(model, on, x):
    """What a call normalises: its dtypes are those that layers compute in, its values those of the vectors there."""
    seen = weights_in_call(model, on, x)
    twin = plain_copy(model).eval()  # with the vectors as they are now
    for name, found in seen.items():
        wanted = twin.get_submodule(name).weight
        half = on and name != "embed"
        assert found.dtype == (torch.bfloat16 if half else torch.float32), name
        tolerance = 1e-2 if half else 1e-5
        largest = float(wanted.detach().abs().max())
        torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance * largest)


def test_one_call_of_the_operation_unless_autocast_parts_the_layers(launches):
    model = bssn_fast.apply(Net())
    model(images())
    launches.clear()
    model(images())
    assert launches == [(5, 1)]
    for on in ON_AND_OFF:
        launches.clear()
        with autocast(on):
            model(images())
        assert launches == ([(4, 1), (1, 1)] if on else [(5, 1)])


def test_one_call_where_autocast_changes_no_dtype(launches):
    model = bssn_fast.apply(Net().bfloat16())
    for on in ON_AND_OFF:
        launches.clear()
        with autocast(on):
            model(images(2, torch.bfloat16))
        assert launches == [(5, 1)]
    model.double()
    launches.clear()
    with autocast(True), contextlib.suppress(RuntimeError):  # torch has no such products
        model(images(2, torch.float64))
    assert launches == [(5, 1)]


def test_autocast_of_another_dtype(launches):
    model = bssn_fast.apply(Net())
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with autocast(True, dtype):
            assert model(images()).dtype == torch.float32
    assert launches[-6:] == [(4, 1), (1, 1)] * 3


@pytest.mark.parametrize("training", [True, False])
def test_switched_between_calls(training):
    model = bssn_fast.apply(Net()).train(training)
    for on in ON_AND_OFF:
        check_weights(model, on, images())


def test_gradients_of_calls_with_and_without():
    model = bssn_fast.apply(Net())
    twin = plain_copy(model)
    for on in ON_AND_OFF:
        x = images()
        for net in (model, twin):
            net.zero_grad()
            with autocast(on):
                net(x).sum().backward()
        assert_same_gradients(model, twin, 5e-2 if on else 1e-4)


def test_switched_in_a_cached_block():
    model = bssn_fast.apply(Net())
    for order in ([False, True, False], [True, False, True]):
        with bssn_fast.cached(model):
            before = None
            for on in order:
                seen = weights_in_call(model, on, images())
                # Without autocast nothing is of use that was made for it; with it, a full-precision weight is.
                assert on or {w.dtype for w in seen.values()} == {torch.float32}
                vectors = [v.clone() for n in norms(model).values() for v in n.buffers()]
                assert before is None or all(map(torch.equal, before, vectors))  # one iteration for the block
                before = vectors
        for on in order:
            check_weights(model, on, images())


def test_evaluation_follows_the_weights_and_computes_nothing_twice(launches):
    model = bssn_fast.apply(Net()).eval()
    for on in ON_AND_OFF:
        check_weights(model, on, images())
    launches.clear()
    for on in ON_AND_OFF:
        with autocast(on):
            model(images())
    assert launches == []
    for on in ON_AND_OFF:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        check_weights(model, on, images())
    for on in ON_AND_OFF:  # another plan iterates than the one whose values are kept
        model.train()
        check_weights(model, not on, images())
        model.eval()
        check_weights(model, on, images())


def test_plans_are_made_once(monkeypatch):
    made, plan_for = [], group.plan_for
    monkeypatch.setattr(group, "plan_for", lambda *args: made.append(1) or plan_for(*args))
    model = bssn_fast.apply(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)))
    for on in ON_AND_OFF:
        with autocast(on):
            model(torch.tensor([[0, 1], [2, 3]]))
    assert len(made) == 3  # one without autocast and two with it
