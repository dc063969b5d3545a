"""Ways to train that call a model, or change its weights, more often than once a step: torch's numbers, in float64."""

import copy

import pytest
import torch
from support import LAYER_NAMES, Net, assert_same_gradients, images
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, update_bn

import bssn_fast


@pytest.fixture(params=["forward", "access"])
def pair(request):
    """A model and how to call it: ours, then torch's, which iterates once a call within its own `cached`."""
    ours, theirs = Net().double(), Net().double()
    for name in LAYER_NAMES:
        parametrizations.spectral_norm(theirs.get_submodule(name))
    with torch.no_grad():  # until u and v have converged: evaluation would estimate others anew
        for _ in range(30):
            theirs(batch(0))
    bssn_fast.apply(ours, "sn", update=request.param).load_state_dict(theirs.state_dict())

    def once(model, x, parameters=None):
        with parametrize.cached():
            return functional_call(model, parameters or {}, (x,)) if parameters else model(x)

    def each(model, x, parameters=None):
        return functional_call(model, parameters, (x,)) if parameters else model(x)

    return (ours, each), (theirs, once if request.param == "forward" else each)


def batch(i, n=4):
    return torch.randn(n, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i))


def meta_learning(model, call):
    """Inner steps that are differentiated through."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for task in range(2):
        fast = dict(model.named_parameters())
        for step in range(2):
            loss = call(model, batch(task + step), fast).square().mean()
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {n: p - 0.05 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        optimizer.zero_grad()
        outer = call(model, batch(9 + task), fast).square().mean()
        outer.backward()
        optimizer.step()
        yield outer


def line_search(model, call):
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (call(model, batch(0)) - 1).square().mean()
        loss.backward()
        return loss

    yield optimizer.step(closure)
    yield optimizer.step(closure)


def sharpness_aware(model, call):
    """A step to where the loss is larger, a second forward there, and back."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    for step in range(3):
        (call(model, batch(step)) - 1).square().mean().backward()
        kept = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=2e-3)
        optimizer.zero_grad()
        loss = (call(model, batch(step)) - 1).square().mean()
        loss.backward()
        for p, old in zip(model.parameters(), kept, strict=True):
            p.data = old
        optimizer.step()
        optimizer.zero_grad()
        yield loss
        yield call(model.eval(), batch(20))
        model.train()


def partly_frozen(model, call):
    """Other layers are frozen in each step, and all for the generator's."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(4):
        model.requires_grad_(True)
        (model.first if step % 2 else model.body).requires_grad_(False)
        optimizer.zero_grad()
        loss = torch.relu(1 - call(model, batch(step))).mean() + torch.relu(1 + call(model, batch(9 + step))).mean()
        loss.backward()
        optimizer.step()
        model.requires_grad_(False)
        x = batch(20 + step).requires_grad_()
        call(model, x).mean().backward()
        yield from (loss, x.grad)
    model.requires_grad_(True)


def accumulated(model, call):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(3):
            (call(model, batch(3 * step + part)) - 1).square().mean().div(3).backward()
        yield nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def averaged(model, call):
    """Stochastic weight averaging: the average's statistics are those of calls of its own."""
    net = nn.Sequential(nn.BatchNorm2d(3), model).double()
    average, optimizer = AveragedModel(net), torch.optim.SGD(net.parameters(), 1e-3)
    for step in range(3):
        optimizer.zero_grad()
        call(net, batch(step)).square().mean().backward()
        optimizer.step()
        average.update_parameters(net)
    update_bn([batch(0)], average)
    yield average.eval()(batch(5))


@pytest.mark.parametrize(
    "procedure", [meta_learning, line_search, sharpness_aware, partly_frozen, accumulated, averaged]
)
def test_procedures(pair, procedure):
    (ours, our_call), (theirs, their_call) = pair
    for found, expected in zip(procedure(ours, our_call), procedure(theirs, their_call), strict=True):
        torch.testing.assert_close(found, expected)
    assert_same_gradients(ours, theirs, 1e-9)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    torch.testing.assert_close(ours.eval()(batch(30)), theirs.eval()(batch(30)))


class Hyper(nn.Module):
    """The first layer's weight comes from another layer, and has nothing to do with its own."""

    def __init__(self):
        super().__init__()
        self.hyper, self.layer = nn.Linear(3, 30), nn.Linear(5, 6)

    def forward(self, x):
        weight = self.hyper(torch.ones(3, dtype=x.dtype)).view(6, 5)
        return functional_call(self.layer, {"parametrizations.weight.original": weight}, (x,))


@pytest.mark.parametrize("update", ["forward", "access"])
def test_a_forward_that_uses_another_weight(update):
    ours, theirs = Hyper().double(), Hyper().double()
    for layer in (theirs.hyper, theirs.layer):
        parametrizations.spectral_norm(layer)
    bssn_fast.apply(ours, "sn", update=update).load_state_dict(theirs.state_dict())
    x = torch.randn(4, 5, dtype=torch.float64)
    if update == "forward":
        with pytest.warns(UserWarning, match=r"'layer' is used with another weight.*update='access'"):
            ours(x)
        ours(x)
        ours.eval()(x)
        return
    for training in (True, True, False):
        for model in (ours, theirs):
            model.train(training).zero_grad()
            model(x).square().sum().backward()
        torch.testing.assert_close(ours(x), theirs(x))
        assert_same_gradients(ours, theirs, 1e-9)


def test_distributed_checkpoints(pair, tmp_path):
    """Of ours into torch's and ours, which then go on alike."""
    checkpoints = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    (ours, _), (theirs, _) = pair
    optimizer = torch.optim.Adam(ours.parameters(), 1e-3)
    ours(images(4, torch.float64)).square().mean().backward()
    optimizer.step()
    model, state = get_state_dict(ours, optimizer)
    checkpoints.save({"model": model, "optimizer": state}, checkpoint_id=tmp_path)
    for other in (copy.deepcopy(ours), theirs):
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.5)
        again = torch.optim.Adam(other.parameters(), 1e-3)
        model, state = get_state_dict(other, again)
        loaded = {"model": model, "optimizer": state}
        checkpoints.load(loaded, checkpoint_id=tmp_path)
        set_state_dict(other, again, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        twin = copy.deepcopy(ours)
        for net in (other, twin):
            net.zero_grad()
            net(batch(1)).square().mean().backward()
        assert_same_gradients(twin, other, 1e-9)
        torch.testing.assert_close(twin.eval()(batch(2)), other.eval()(batch(2)))
