"""What changes, ends or cannot be where other parametrizations compute the weight that is normalised."""

import copy
import gc
import weakref

import pytest
import torch
from compiling import compiled
from preceding import KINDS, Half, an_input, with_first
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import bssn_fast


class Marked(torch.autograd.Function):
    """Keeps an object in the graph, which lives as long as that."""

    @staticmethod
    def forward(ctx, weight, marks):
        ctx.mark = Mark()
        marks.add(ctx.mark)
        return weight.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Mark:
    pass


class Marking(nn.Module):
    def __init__(self):
        super().__init__()
        self.marks = weakref.WeakSet()

    def forward(self, weight):
        return Marked.apply(weight, self.marks)


@pytest.mark.parametrize("training", [False, True])
def test_graphs_are_not_kept(training):
    marking = Marking()
    layer = bssn_fast.apply(with_first(nn.Linear(7, 5), marking), "sn").train(training)
    x = an_input("low_rank")
    for _ in range(2):
        layer(x)
        gc.collect()
        assert not marking.marks
    result = layer(x)
    assert len(marking.marks) == 1
    del result
    gc.collect()
    assert not marking.marks


def test_a_gain_is_learned_with_the_others():
    layer = KINDS["low_rank"]()
    before = layer.weight.detach().clone()
    bssn_fast.apply(layer, "sn", gain="learn")
    torch.testing.assert_close(layer.eval().weight.detach(), before, rtol=1e-2, atol=1e-2)
    gain = layer.parametrizations.weight[1].gain
    layer(an_input("low_rank")).sum().backward()
    assert gain.requires_grad
    assert gain.grad is not None


def test_looking_does_not_run_the_others_in_training():
    layer = bssn_fast.apply(with_first(nn.Linear(7, 5), Half()), "sn")
    bssn_fast.sigma(layer), bssn_fast.summary(layer), bssn_fast.spectral_norms(layer)
    half = layer.parametrizations.weight[0]
    assert half.training
    assert half.calls == 0
    layer(an_input("low_rank"))
    assert half.calls == 1


@pytest.mark.parametrize("kind", ["low_rank", "weight_norm"])
def test_what_cannot_be_done_is_named(kind):
    model = nn.Sequential(bssn_fast.spectral_norm(KINDS[kind]()))
    state = copy.deepcopy(model.state_dict())
    for verb in (bssn_fast.remove, bssn_fast.diagnostics.measure):
        with pytest.raises(ValueError, match=r"0: \w+ computes the weight that is normalised.*remove_parametrizations"):
            verb(model)
    with pytest.raises(ValueError, match="0: the weight is computed by other parametrizations"):
        bssn_fast.Projection(model, radius=1.0)
    assert state.keys() == model.state_dict().keys()
    weight = model.eval()[0].weight.detach().clone()
    parametrize.remove_parametrizations(model[0], "weight")  # as the message advises
    assert torch.equal(model[0].weight, weight)
    assert type(model[0]) is nn.Linear
    bssn_fast.remove(bssn_fast.apply(model))


def test_what_follows_is_not_measured_past():
    model = nn.Sequential(with_first(bssn_fast.apply(nn.Linear(7, 5).double()), Half()))
    with pytest.raises(ValueError, match=r"0: Half changes the normalised weight; .*weight\[1:\]"):
        bssn_fast.spectral_norms(model)


@pytest.mark.parametrize("ours_first", [True, False])
def test_ours_is_taken_off_and_the_other_stays(ours_first):
    layer = nn.Linear(7, 5).double()
    for first in (ours_first, not ours_first):
        bssn_fast.spectral_norm(layer) if first else with_first(layer, Half())
    del layer.parametrizations.weight[0 if ours_first else 1]
    x = an_input("low_rank")
    expected = nn.functional.linear(x, layer.parametrizations.weight.original / 2, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(compiled(layer)(x), expected)
    layer.weight = torch.ones(5, 7, dtype=torch.float64)
    torch.testing.assert_close(layer.weight.detach(), torch.ones(5, 7, dtype=torch.float64))


def test_the_others_of_a_model_go_on_when_ours_is_taken_off_by_hand():
    model = bssn_fast.apply(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double(), "sn")
    with_first(model[0], Half())
    del model[0].parametrizations.weight[0]
    x = torch.randn(2, 4, dtype=torch.float64)
    assert bssn_fast.sigma(model).keys() == {"1"}
    for other in (model, copy.deepcopy(model)):
        hidden = nn.functional.linear(x, other[0].parametrizations.weight.original / 2, other[0].bias)
        torch.testing.assert_close(other(x), other[1](hidden), rtol=1e-2, atol=1e-2)
    bssn_fast.apply(model, "bssn", names=["1"])(x)
    bssn_fast.remove(model)
    assert not model._forward_pre_hooks


def test_ours_is_like_any_other_once_what_came_before_is_taken_off():
    layer = bssn_fast.spectral_norm(with_first(nn.Linear(4, 3), Half()))
    del layer.parametrizations.weight[0]
    model = bssn_fast.apply(nn.Sequential(layer), "bsn")
    assert len(model._forward_pre_hooks) == 1
    bssn_fast.load_state_dict(model, nn.Sequential(nn.Linear(4, 3).double()).state_dict())
    bssn_fast.remove(model)


def test_pruned_under_torchs_norm_is_named():
    layer = parametrizations.spectral_norm(nn.Linear(4, 3))
    prune.l1_unstructured(layer.parametrizations.weight, "original", 0.3)
    with pytest.raises(ValueError, match=r"prune\.remove"):
        bssn_fast.apply(layer)
