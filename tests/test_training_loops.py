"""Nothing is stale in training either, whatever changes the weights, and two runs are equal."""

import copy

import pytest
import torch
from support import LAYER_NAMES, Net, assert_same_gradients, images, norm_of, original, plain_copy, same, vectors_of
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrizations

import bssn_fast

OPTIMIZERS = {
    "sgd": lambda p, **how: torch.optim.SGD(p, lr=0.1, momentum=0.9, **how),
    "adam": lambda p, **how: torch.optim.Adam(p, lr=0.01, **how),
    "adamw": lambda p, **how: torch.optim.AdamW(p, lr=0.01, **how),
}


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=["loop", "foreach", "fused"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers(kind, how):
    model = bssn_fast.apply(Net().double())
    twin = plain_copy(model)
    optimizers = [OPTIMIZERS[kind](net.parameters(), **how) for net in (model, twin)]
    for _ in range(4):
        x = images(4, torch.float64)
        norms = []
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            norms.append(clip_grad_norm_(net.parameters(), 0.5, foreach=bool(how)))
            optimizer.step()
        torch.testing.assert_close(norms[0], norms[1])
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def replaced_data(model):
    for p in model.parameters():
        p.data = torch.randn_like(p)


def moved(model):
    model.float().double()


def halves_and_back(model):
    model.half().double()


def assigned(model):
    other = bssn_fast.apply(Net().double())
    model.load_state_dict(other.state_dict(), assign=True)


def new_parameters(model):
    for module in model.modules():
        if hasattr(module, "parametrizations"):
            module.parametrizations["weight"].original = nn.Parameter(2 * original(module).detach())


@pytest.mark.parametrize("change", [replaced_data, moved, halves_and_back, assigned, new_parameters])
@pytest.mark.parametrize("update", ["forward", "access"])
def test_weights_change_between_steps(change, update):
    model = bssn_fast.apply(Net().double(), update=update)
    model(images(2, torch.float64)).sum().backward()
    change(model)
    model.zero_grad()
    twin = plain_copy(model)
    x = images(2, torch.float64)
    model(x).square().sum().backward(), twin(x).square().sum().backward()
    assert_same_gradients(model, twin, 1e-9)


def test_functional_call_in_training():
    model = bssn_fast.apply(Net().double())
    x = images(2, torch.float64)
    model(x)
    parameters = {n: torch.randn_like(p).requires_grad_() for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    twin = copy.deepcopy(model)
    for n, p in twin.named_parameters():
        p.data.copy_(parameters[n])
    kept = vectors_of(model)
    torch.func.functional_call(model, {**parameters, **buffers}, (x,)).square().sum().backward()
    twin(x).square().sum().backward()
    for n, p in twin.named_parameters():
        torch.testing.assert_close(parameters[n].grad, p.grad)
    assert same(kept, vectors_of(model))  # the vectors given were used and changed, and no others
    assert all(torch.equal(buffers[n], b) for n, b in twin.named_buffers())
    assert all(p.grad is None for p in model.parameters())


def test_overridden_train():
    class Frozen(Net):
        def train(self, mode=True):
            super().train(mode)
            self.first.eval()
            self.body.eval()
            return self

    model = bssn_fast.apply(Frozen().double())
    model.train()
    twin = plain_copy(model)
    before = vectors_of(model)
    x = images(2, torch.float64)
    for _ in range(2):
        model(x).sum().backward(), twin(x).sum().backward()
    assert_same_gradients(model, twin, 1e-10)
    changed = {k.rpartition(".")[0] for k, v in vectors_of(model).items() if not torch.equal(v, before[k])}
    assert "embed" in changed
    assert changed <= {"head", "embed"}  # the head's matrix of one row has nothing to iterate


def run(threads=1):
    """Train a little from a seed; everything that came of it."""
    torch.manual_seed(11)
    torch.set_num_threads(threads)
    model = bssn_fast.apply(Net())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        x = images(4).requires_grad_()
        out = model(x)
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (out.square().sum() + grad.square().sum()).backward()
        optimizer.step()
    model.first.weight = torch.randn(8, 3, 3, 3)
    with torch.no_grad():
        model(images())
    return {**model.state_dict(), **{f"{n} grad": p.grad for n, p in model.named_parameters()}}


def test_two_runs_are_equal():
    assert same(run(), run())


def test_deterministic_algorithms():
    expected = run()
    torch.use_deterministic_algorithms(True)
    try:
        assert same(run(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_random_numbers_drawn_by_apply():
    """As documented: u and v of each new layer, then those of the input side; none for layers with known vectors."""
    model = Net()
    torch.manual_seed(2)
    bssn_fast.apply(model, "bssn")
    after = torch.get_rng_state()
    torch.manual_seed(2)
    for name in LAYER_NAMES:
        for vector in norm_of(model.get_submodule(name)).buffers():
            torch.empty(vector.shape).normal_()
    assert torch.equal(after, torch.get_rng_state())
    bssn_fast.apply(model, "sn")
    theirs = parametrizations.spectral_norm(nn.Linear(3, 4))
    after = torch.get_rng_state()
    bssn_fast.apply(theirs, "sn"), model(images(0)), bssn_fast.remove(model)
    assert torch.equal(after, torch.get_rng_state())


def test_sn_draws_what_torch_draws():
    ours, theirs = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(4)
    bssn_fast.apply(ours, "sn")
    state = torch.get_rng_state()
    torch.manual_seed(4)
    parametrizations.spectral_norm(theirs)
    assert torch.equal(state, torch.get_rng_state())
