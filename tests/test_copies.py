"""Copies, files and processes: what comes back computes the same, bit by bit, and is independent."""

import contextlib
import copy

import pytest
import torch
from support import Net, images, norm_of, norms, original, same, vectors_of
from torch import nn
from workers import train_and_send

import bssn_fast


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("called", ["before", "inside", "both"])
def test_deepcopy(mode, training, called):
    model = bssn_fast.apply(Net()).train(training)
    x = images()
    if called != "inside":
        model(x)
    with mode():
        if called != "before":
            model(x), model.first(x), model.head.weight
        twin = copy.deepcopy(model)
    before = vectors_of(model)
    assert same(before, vectors_of(twin))
    expected = model(x)
    assert torch.equal(twin(x), expected)
    assert same(vectors_of(model), vectors_of(twin))
    after = vectors_of(model)
    with torch.no_grad():
        original(twin.first).mul_(2).add_(1)
    twin.train()(x).sum().backward()
    assert same(after, vectors_of(model))
    assert original(model.first).grad is None
    assert torch.equal(model.eval()(x), model(x))


def step(model, optimizer, seed, dtype):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(images(4)).relu().sum() - model(images(4)).square().sum()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("variant", ["sn", "bssn"])
@pytest.mark.parametrize("update", ["forward", "access"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_bit_by_bit(variant, update, dtype, tmp_path):
    def make():
        model = bssn_fast.apply(Net(), variant, update=update)
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    model, optimizer = make()
    for seed in range(3):
        step(model, optimizer, seed, dtype)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    other, its_optimizer = make()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other.load_state_dict(saved["model"]), its_optimizer.load_state_dict(saved["optimizer"])
    for seed in range(3, 6):
        step(model, optimizer, seed, dtype), step(other, its_optimizer, seed, dtype)
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    x = images()
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_spawned_process():
    model, x = bssn_fast.apply(Net()), images()
    context = torch.multiprocessing.get_context("spawn")
    queue, done = context.Queue(), context.Event()
    process = context.Process(target=train_and_send, args=(model.state_dict(), x, queue, done), daemon=True)
    process.start()
    state, grads = copy.deepcopy(queue.get(timeout=120))
    done.set()
    process.join(60)
    assert process.exitcode == 0
    model(x).sum().backward()
    assert same(dict(model.state_dict()), dict(state))
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())


def test_vectors_are_saved_as_they_are_and_nothing_else_is():
    model = bssn_fast.apply(Net(), "sn")
    saved = model.state_dict()
    theirs = Net()
    for name in norms(model):
        nn.utils.parametrizations.spectral_norm(theirs.get_submodule(name), dim=norms(model)[name].dim)
    assert list(saved) == list(theirs.state_dict())


def test_a_write_into_a_weight_in_use_is_refused_at_a_copys_first_call():
    model = bssn_fast.apply(nn.Sequential(nn.Linear(3, 3)), "sn")
    x = torch.randn(2, 3)
    model(x)
    twin = copy.deepcopy(model)
    for m in (model, twin):
        weight = m[0].weight
        weight.data += 1
        with pytest.raises(RuntimeError, match="in use"):
            m(x)


class Twice(nn.Sequential):
    def forward(self, x):
        return self[0](self[0](x))


@pytest.mark.parametrize("called", [True, False])
def test_changes_of_a_copy(called):
    twin = copy.deepcopy(bssn_fast.apply(Net()))
    if called:
        twin(images())
    bssn_fast.remove(twin)
    assert not twin._forward_pre_hooks
    assert not twin._forward_hooks

    twin = copy.deepcopy(bssn_fast.apply(Twice(nn.Linear(3, 3, dtype=torch.float64))))
    if called:
        twin(torch.ones(1, 3, dtype=torch.float64))
    bssn_fast.apply(twin[0], "sn", update="access")
    norm = norm_of(twin[0])
    norm._v.copy_(torch.ones(3) / 3**0.5)
    expected = norm._v.clone()
    twin(torch.ones(1, 3, dtype=torch.float64))
    for _ in range(2):  # one iteration for each use
        expected = nn.functional.normalize(original(twin[0]).T @ (original(twin[0]) @ expected), dim=0)
    torch.testing.assert_close(norm._v, expected)
