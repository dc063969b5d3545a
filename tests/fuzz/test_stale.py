"""Writes that torch does not count are seen, each of them."""

from __future__ import annotations

import copy

import pytest
import torch
from fuzzing import Small, cases, inputs, small
from support import norms, original, plain_copy
from torch import nn

import bssn_fast
from bssn_fast import reference

LAYERS = {
    "linear": lambda: nn.Linear(32, 24),
    "conv": lambda: nn.Conv2d(16, 12, 3, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(16, 12, 3),
    "embedding": lambda: nn.Embedding(20, 16),
}


def evaluated(name):
    layer = bssn_fast.apply(nn.Sequential(LAYERS[name]()).double()).eval()
    x = (
        torch.arange(20)
        if name == "embedding"
        else torch.randn((2, 32) if name == "linear" else (2, 16, 5, 5)).double()
    )
    with torch.no_grad():
        layer(x)
    return layer, x


def assert_fresh(model, x):
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain_copy(model)(x))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dim", [0, 1])
def test_channels_cut_one_at_a_time(name, dim):
    model, x = evaluated(name)
    weight = original(model[0]).detach()
    for j in range(0, weight.shape[dim], 2):
        weight.numpy().swapaxes(0, dim)[j] = 0
        assert_fresh(model, x)


@pytest.mark.parametrize("seed", cases(3))
@pytest.mark.parametrize("name", LAYERS)
def test_masks_clipping_and_single_elements(name, seed):
    torch.manual_seed(seed)
    model, x = evaluated(name)
    weight = original(model[0])
    weight.data *= torch.ones_like(weight).flatten(1).tril().view_as(weight)
    assert_fresh(model, x)
    bound = weight.detach().abs().flatten().kthvalue(max(1, int(0.999 * weight.numel()))).values.item()
    weight.data.clamp_(-bound, bound)
    assert_fresh(model, x)
    for _ in range(5):
        weight.detach().numpy().reshape(-1)[torch.randint(weight.numel(), (1,)).item()] += 1e-3
        assert_fresh(model, x)


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_writes_into_kept_results(name):
    """A plot in a forward hook."""
    model, x = evaluated(name)

    def plot(layer, *_):
        a = layer.weight.detach().numpy()
        a -= a.min()

    handle = model[0].register_forward_hook(plot)
    with torch.no_grad():
        before = model(x)
        for _ in range(2):
            assert torch.equal(model(x), before)
        handle.remove()
        assert torch.equal(model(x), before)
    assert_fresh(model, x)


def test_finite_differences():
    layer = bssn_fast.apply(nn.Linear(5, 4).double()).eval()
    weight = original(layer)
    x = torch.randn(3, 5, dtype=torch.float64)
    layer(x)
    assert torch.autograd.gradcheck(lambda w: layer(x), (weight,))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_fused_optimizers_in_a_block(optimizer):
    model, x = small(), inputs()
    steps = optimizer(model.parameters(), lr=0.1, fused=True)
    with bssn_fast.cached(model):
        for _ in range(3):
            model.zero_grad()
            model(x).square().sum().backward()
            steps.step()
            with torch.no_grad():
                found = model(x)
                torch.testing.assert_close(found, plain_copy(copy.deepcopy(model).eval())(x))


def test_collectives(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model, x = small(), inputs()
        for block in (bssn_fast.cached(model), torch.no_grad()):
            with block:
                model(x)
                weight = original(model.conv).detach()
                tensor = weight.clone() * 3
                work = torch.distributed.all_reduce(tensor, async_op=True)
                work.wait()
                torch.distributed.broadcast(weight, 0)
                weight.data.copy_(tensor)
                found = model(x).detach()
                torch.testing.assert_close(found, plain_copy(copy.deepcopy(model).eval())(x))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("seed", cases(4))
@pytest.mark.parametrize("made", ["copied", "applied"])
def test_target_networks_of_averaged_parameters(made, seed):
    """Of parameters alone, as many programs do: sigma stays right within 10%, over hundreds of steps."""
    torch.manual_seed(seed)
    online = bssn_fast.apply(Small().double())
    target = copy.deepcopy(online) if made == "copied" else bssn_fast.apply(Small().double())
    target.eval()
    for step in range(200):
        with torch.no_grad():
            for p, q in zip(target.parameters(), online.parameters(), strict=True):
                q.add_(torch.randn_like(q), alpha=0.1)  # training
                p.data.lerp_(q.data, 0.05)
            target(inputs())
        if step % 20 == 19:
            assert_sigma(target)


def assert_sigma(model):
    for name, norm in norms(model).items():
        weight = original(model.get_submodule(name)).detach()
        sides = [
            torch.linalg.matrix_norm(reference.unfold(weight, d), 2) for d in ([0, 1] if norm.two_sided else [norm.dim])
        ]
        torch.testing.assert_close(bssn_fast.sigma(model)[name], sum(sides) / len(sides), rtol=0.1, atol=0)


def test_a_fault_would_be_found(monkeypatch):
    """Of each tensor every 32nd element is looked at."""
    from bssn_fast.calls import kept

    contents = kept.contents_of
    monkeypatch.setattr(
        kept, "contents_of", lambda tensors, **_: contents([t.flatten()[::32].clone() for t in tensors])
    )
    for test in (lambda: test_masks_clipping_and_single_elements("conv", 0), test_finite_differences):
        with pytest.raises((AssertionError, RuntimeError)):
            test()
