"""Vectors that cannot belong to a weight are estimated anew: the next sigma is right."""

import copy

import pytest
import torch
from support import Net, images, norm_of, norms, original, same, vectors_of
from test_loading import assert_sigma_right, exact_sigma
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bssn_fast
from bssn_fast import reference
from bssn_fast.calls.estimation import belong, estimate_vectors


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (256, 512), (1, 40), (7, 3, 1, 1)])
@pytest.mark.parametrize("spectrum", ["random", "diagonal"])
def test_estimate(shape, spectrum):
    """Also from hints that are orthogonal to what is looked for, where power iterations alone would stay."""
    weight = torch.randn(shape)
    both = weight.shape[2:].numel() > 1
    if spectrum == "diagonal":
        weight = torch.zeros(shape)
        for j in range(min(shape[:2])):
            weight[j, j] = 1 + (j == 0) / 2
    sides = [(0, (shape[0], weight.numel() // shape[0]))] + [(1, (shape[1], weight.numel() // shape[1]))] * both
    hints = [torch.eye(size)[-1] for _, sizes in sides for size in sizes]
    found = estimate_vectors(weight, 0, both, hints=hints, eps=1e-12)
    for (dim, _), (u, v) in zip(sides, (found[:2], found[2:]), strict=False):
        matrix = reference.unfold(weight, dim)
        assert float(u @ matrix @ v) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=0.005)
    assert belong(weight, found, 0, 1e-12)


def initialised(model):
    for module in model.modules():
        if hasattr(module, "parametrizations"):
            nn.init.normal_(original(module), std=3)


def initialised_by_data(model):
    for module in model.modules():
        if hasattr(module, "parametrizations"):
            original(module).data.uniform_(-2, 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", ["forward", "access"])
@pytest.mark.parametrize("change", [initialised, initialised_by_data])
def test_weights_initialised_before_the_first_call(training, update, change):
    model = bssn_fast.apply(Net(), update=update).train(training)
    change(model)
    model(images())
    assert_sigma_right(model)


def test_good_vectors_are_left_alone():
    """Those of a model just made, of one step of training, and of a copy, are as torch has them."""
    model = bssn_fast.apply(Net(), "sn").eval()
    others = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    before = vectors_of(model)
    torch.func.functional_call(model, others, (images(),))
    assert same(before, vectors_of(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        before = vectors_of(model)
        model.eval()(images())
        copy.deepcopy(model)(images())
        assert same(before, vectors_of(model))
        optimizer.zero_grad()
        model.train()(images()).square().sum().backward()
        optimizer.step()


def train(model, averages, steps=20):
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(images(4)).square().sum().backward()
        optimizer.step()
        for average in averages:
            average(model)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("called", ["never", "always"])
def test_averaged_model(use_buffers, called):
    model = bssn_fast.apply(Net())
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers).eval()

    def average(model):
        averaged.update_parameters(model)
        if called == "always":
            averaged(images())

    train(model, [average])
    averaged(images())
    assert_sigma_right(averaged.module, rel=0.01 if use_buffers else 0.05)  # else the vectors are the model's
    before = vectors_of(model)
    averaged.train()(images())
    assert same(before, vectors_of(model))
    assert_sigma_right(averaged.module, rel=0.01 if use_buffers else 0.05)


@pytest.mark.parametrize("through", ["version", "data"])
def test_average_by_hand(through):
    model = bssn_fast.apply(Net())
    averaged = copy.deepcopy(model).eval()
    averaged(images())

    @torch.no_grad()
    def average(model):
        pairs = (zip(a, b, strict=True) for a, b in (
            (averaged.parameters(), model.parameters()), (averaged.buffers(), model.buffers())
        ))  # fmt: skip
        for pair in pairs:
            for mean, new in pair:
                (mean.data if through == "data" else mean).lerp_(new, 0.3)
        averaged(images())
        assert_sigma_right(averaged)

    train(model, [average])
    assert all(abs(float(v.norm()) - 1) < 2e-3 for p in norms(averaged).values() for v in p.buffers())


def test_vectors_written_in_evaluation_only_then():
    """In training one power iteration follows, as in torch."""
    layer = bssn_fast.apply(nn.Linear(6, 5), "sn")
    layer(torch.randn(2, 6))
    with torch.no_grad():
        norm_of(layer)._v.mul_(0.5)
    layer.eval()(torch.randn(2, 6))
    assert float(bssn_fast.sigma(layer)[""]) == pytest.approx(exact_sigma(layer), rel=0.01)
    assert float(norm_of(layer)._v.norm()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("way", ["written", "data", "replaced"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", ["forward", "access"])
def test_vectors_chosen_by_hand_before_the_first_call(way, training, update):
    """Also such as one iteration makes far better: the numbers are torch's."""
    theirs = parametrizations.spectral_norm(nn.Linear(6, 5).double())
    ours = bssn_fast.apply(copy.deepcopy(theirs), "sn", update=update)
    weight, u, v = original(theirs).detach(), torch.eye(5).double()[0], torch.eye(6).double()[0]
    assert not belong(weight, [u, v], 0, 1e-12)
    for layer in (theirs, ours):
        for name, chosen in (("_u", u), ("_v", v)):
            if way == "replaced":
                setattr(norm_of(layer), name, chosen.clone())
            else:
                vector = getattr(norm_of(layer), name)
                (vector.data if way == "data" else vector).copy_(chosen)
        layer.train(training)
    x = torch.randn(2, 6).double()
    torch.testing.assert_close(ours(x), theirs(x))


def in_place(weight, value):
    with torch.no_grad():
        weight.copy_(value)


def through_data(weight, value):
    weight.data.copy_(value)


def data_replaced(weight, value):
    weight.data = value.clone()


def as_array(weight, value):
    weight.detach().numpy()[:] = value.numpy()


@pytest.mark.parametrize("write", [in_place, through_data, data_replaced, as_array])
@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("how", ["alike", "autocast", "alone"])
def test_other_weights_between_training_and_evaluation(write, evaluated, how):
    """Parameters of an average, or of a file, without their vectors, put in the place of those that were trained."""
    model, other = bssn_fast.apply(Net()), Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    if evaluated:
        model.eval()(images())
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = model.train()(images()).square().mean()
        loss.backward()
        optimizer.step()
    for name in norms(model):
        write(original(model.get_submodule(name)), other.get_submodule(name).weight.detach())
    model.eval()
    if how == "alone":
        for name in norms(model):
            _ = model.get_submodule(name).weight
    else:
        model(images())
    assert_sigma_right(model, rel=0.05)
    before = vectors_of(model)
    model(images())
    assert same(before, vectors_of(model))


def test_another_parameter_between_training_and_evaluation():
    model = bssn_fast.apply(Net())
    model(images()).mean().backward()
    model.first.parametrizations.weight.original = nn.Parameter(torch.randn(8, 3, 3, 3))
    model.eval()(images())
    assert_sigma_right(model, rel=0.05)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_evaluation_after_each_step_is_torchs(optimizer, launches):
    theirs = Net().double()
    ours = bssn_fast.apply(copy.deepcopy(theirs), "sn")
    for name, norm in norms(ours).items():
        layer = parametrizations.spectral_norm(theirs.get_submodule(name))
        for buffer, value in zip(norm_of(layer).buffers(), norm.buffers(), strict=True):
            buffer.copy_(value)
    launches.clear()
    steps = [optimizer(m.parameters(), lr=2e-4) for m in (ours, theirs)]
    for _ in range(20):
        x, y = images(4, torch.float64), images(2, torch.float64)
        found = []
        for model, step in zip((ours, theirs), steps, strict=True):
            step.zero_grad()
            model.train()(x).square().mean().backward()
            step.step()
            found.append(model.eval()(y))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    assert max(n for _, n in launches) == 1, "nothing was estimated"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(4, 12), (12, 4), (40, 7), (5, 3, 2)])
def test_a_singular_value_that_outgrows_the_one_in_use(shape, dtype):
    """Only weights change, as in a target network: the vectors stay where they are, and an iteration finds nothing."""
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    with torch.no_grad():
        layer.weight.flatten(1)[:3, :3] = torch.diag(torch.tensor([1.3, 1.0, 0.5], dtype=dtype))
    bssn_fast.apply(layer, "sn", names=["weight"]).eval()
    torch.testing.assert_close(layer.weight.abs().max().item(), 1.0, rtol=3e-3, atol=0)
    with torch.no_grad():
        original(layer).flatten(1)[1, 1] = 1.5
    torch.testing.assert_close(layer.weight.abs().max().item(), 1.0, rtol=3e-3, atol=0)
    with torch.no_grad():
        original(layer)[0] = torch.inf
    assert layer.weight.isnan().all()  # as ever, and no error


def test_autocast_does_not_reach_the_look_for_another_singular_value():
    layer = nn.Linear(12, 4, bias=False)
    with torch.no_grad():
        layer.weight.zero_()[:3, :3] = torch.diag(torch.tensor([1300.0, 1000.0, 500.0]))
    bssn_fast.apply(layer, "sn").eval()
    layer(torch.eye(12))
    with torch.no_grad():
        original(layer)[1, 1] = 1500.0
    with torch.autocast("cpu", torch.float16):  # whose largest number is less than the square
        layer(torch.eye(12))
    assert_sigma_right(layer)


def test_a_functional_call_after_training_changes_no_vectors():
    model = bssn_fast.apply(Net())
    model(images()).mean().backward()
    before = vectors_of(model)
    others = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    torch.func.functional_call(model.eval(), others, (images(),))
    assert all(norm.seen is None for norm in norms(model).values())
    model(images())
    torch.func.functional_call(model, {n: nn.Parameter(p) for n, p in others.items()}, (images(),))
    assert same(before, vectors_of(model))


@pytest.mark.parametrize("way", ["read alone", "another plan in between"])
def test_weights_written_through_data_where_another_plan_evaluates(way):
    """What one plan knows of the weights' contents the next one does too."""
    model, other = bssn_fast.apply(Net()).eval(), Net()
    with torch.no_grad():
        model(images())
    if way == "another plan in between":
        parameters = {name: 1.0 * p.detach() for name, p in model.named_parameters()}
        torch.func.functional_call(model, parameters, (images(),))
    for name in norms(model):
        original(model.get_submodule(name)).data.copy_(other.get_submodule(name).weight.detach())
    if way == "read alone":
        for name in norms(model):
            _ = model.get_submodule(name).weight
    else:
        model(images())
    assert_sigma_right(model, rel=0.05)


def test_another_plan_in_between_changes_no_vectors():
    """Vectors that a step of training has left behind a little stay where no weight changes."""
    model = bssn_fast.apply(Net())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(images()).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        model.eval()(images())
        before = vectors_of(model)
        torch.func.functional_call(model, {n: 1.0 * p for n, p in model.named_parameters()}, (images(),))
        model(images())
        for name in norms(model):
            _ = model.get_submodule(name).weight
    assert same(before, vectors_of(model))
