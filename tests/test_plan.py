"""What of the last result a plan uses again. Whole models are tested in test_evaluation.py and test_cached.py."""

import pytest
import torch
from support import Net, norm_of, norms, original
from torch import nn

import bssn_fast
from bssn_fast.calls.plan import Plan, parted_by_autocast, partition, signature
from bssn_fast.modules.group import groups_of


@pytest.fixture
def layer():
    return bssn_fast.apply(nn.Conv2d(3, 4, 3))


def test_signature_changes_with_all_that_a_plan_depends_on():
    weight = torch.randn(4, 3, 2, 2)
    same = signature([weight])
    assert signature([torch.zeros(4, 3, 2, 2)]) == same
    assert signature([weight.double()]) != same
    assert signature([weight.contiguous(memory_format=torch.channels_last)]) != same
    assert signature([weight.reshape(4, 3, 4, 1)]) != same
    assert signature([weight.to("meta")]) != same
    assert signature([weight, weight]) != same


def test_partition():
    model = bssn_fast.apply(Net())
    bssn_fast.apply(model, scale=0.5, eps=1e-6, names=["head"])
    bssn_fast.apply(model, scale=0.7, names=["embed"])  # scales may differ
    members = [norm_of(model.get_submodule(n)) for n in norms(model)]
    weights = [original(model.get_submodule(n)) for n in norms(model)]
    assert partition(members, weights, [True] * 5) == [[0, 1, 2, 4], [3]]
    assert partition(members, weights, [True, False, True, True, True]) == [[0, 2, 4], [1], [3]]
    with torch.autocast("cpu", torch.bfloat16):  # which an embedding does not follow
        assert partition(members, weights, [True] * 5) == [[0, 1, 2], [3], [4]]
    weights[2] = weights[2].double()
    assert partition(members, weights, [True] * 5) == [[0, 1, 4], [2], [3]]


def test_autocast_parts_kinds_with_members_of_both_sorts():
    model = bssn_fast.apply(Net())
    members = [norm_of(model.get_submodule(n)) for n in norms(model)]
    weights = [original(model.get_submodule(n)) for n in norms(model)]
    assert parted_by_autocast(members, weights) == [0]
    assert parted_by_autocast(members[:4], weights[:4]) == parted_by_autocast(members[4:], weights[4:]) == []
    weights[4] = weights[4].double()
    assert parted_by_autocast(members, weights) == []


def test_values_are_used_again_only_if_kept(layer, launches):
    weight = original(layer)
    plan = Plan([norm_of(layer)], [weight])
    launches.clear()
    (a,) = plan.normalize([weight], iterate=False, keep=True).normalized
    (b,) = plan.normalize([weight], iterate=False, keep=True).normalized
    assert len(launches) == 1
    assert a.data_ptr() == b.data_ptr()
    assert a.grad_fn is not b.grad_fn
    (c,) = plan.normalize([weight], iterate=False, keep=False).normalized
    assert len(launches) == 2
    assert torch.equal(a, c)
    plan.normalize([weight], iterate=False, keep=True)
    assert len(launches) == 3


def test_an_iteration_elsewhere_is_noticed(layer, launches):
    weight = original(layer)
    plan, other = Plan([norm_of(layer)], [weight]), Plan([norm_of(layer)], [weight])
    plan.normalize([weight], iterate=False, keep=True)
    other.normalize([weight], iterate=True, keep=False)
    launches.clear()
    plan.normalize([weight], iterate=False, keep=True)
    assert len(launches) == 1


def test_graphs_of_kept_values_are_independent(layer):
    weight = original(layer)
    plan = Plan([norm_of(layer)], [weight])
    for _ in range(3):
        plan.normalize([weight], iterate=False, keep=True).normalized[0].sum().backward()
    three = weight.grad.clone()
    weight.grad = None
    plan.normalize([weight], iterate=False, keep=True).normalized[0].sum().backward()
    torch.testing.assert_close(three, 3 * weight.grad)


def test_autocast_is_part_of_what_is_kept(layer):
    weight = original(layer)
    plan = Plan([norm_of(layer)], [weight])
    (full,) = plan.normalize([weight], iterate=False, keep=True).normalized
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (half,) = plan.normalize([weight], iterate=False, keep=True).normalized
    (again,) = plan.normalize([weight], iterate=False, keep=True).normalized
    assert (full.dtype, half.dtype, again.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert torch.equal(full, again)
    assert torch.equal(full.bfloat16(), half)


def test_weights_that_a_plan_does_not_fit_never_fit_it(layer):
    weight = original(layer)
    plan = Plan([norm_of(layer)], [weight])
    other = nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last))
    assert plan.fits([weight])
    for _ in range(2):
        assert not plan.fits([other])
    assert plan.fits([weight])


def test_a_call_in_between_changes_no_plans_of_this_one(monkeypatch):
    """Another thread, or a signal handler, may call the model with other weights at any moment."""
    torch.manual_seed(0)
    model = bssn_fast.apply(nn.Conv2d(3, 4, 3), "sn").eval()
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    state = {n: t.clone(memory_format=torch.channels_last) for n, t in model.named_parameters() if t.ndim == 4}
    (group,) = groups_of(model)
    plans = group._plans

    def interrupted(chosen):
        monkeypatch.setattr(group, "_plans", plans)
        assert torch.allclose(torch.func.functional_call(model, state, x), expected, atol=1e-6)
        return plans(chosen)

    monkeypatch.setattr(group, "_plans", interrupted)
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_evaluation_of_a_layer_alone_is_kept_until_the_model_is_called():
    model = bssn_fast.apply(nn.Sequential(nn.Linear(3, 3)), "sn").eval()
    assert model[0].weight.shape == (3, 3)
    assert norm_of(model[0])._plan._kept is not None
    model.train()(torch.randn(2, 3))
    assert norm_of(model[0])._plan._kept is None
