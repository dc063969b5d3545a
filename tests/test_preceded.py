"""Weights that other parametrizations compute before they are normalised, as torch's spectral norm takes them."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from compiling import compiled
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import bssn_fast
from bssn_fast import reference
from bssn_fast.calls import kept


class LowRank(nn.Module):
    """W + A B, with parameters of its own."""

    def __init__(self, rows, columns):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rows, 2)), nn.Parameter(torch.randn(2, columns))

    def forward(self, weight):
        return weight + self.a @ self.b


class Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


class FirstRow(nn.Module):
    """All rows are views of the first one."""

    def forward(self, weight):
        return weight[:1].expand_as(weight)


class Transposed(nn.Module):
    def forward(self, weight):
        return weight.transpose(0, 1)


class Half(nn.Module):
    """Halves in training, and counts how often."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight):
        self.calls += self.training
        return weight / 2

    def right_inverse(self, weight):
        return 2 * weight


def with_first(layer, *others, name="weight"):
    for other in others:
        parametrize.register_parametrization(layer.double(), name, other.double(), unsafe=True)
    return layer


KINDS = {
    "low_rank": lambda: with_first(nn.Linear(7, 5), LowRank(5, 7)),
    "masked": lambda: with_first(nn.Linear(7, 5), Masked((torch.rand(5, 7) > 0.3).double())),
    "symmetric": lambda: with_first(nn.Linear(7, 7), Symmetric()),
    "rows_that_share_memory": lambda: with_first(nn.Linear(7, 5), FirstRow()),
    "another_shape": lambda: with_first(nn.Linear(5, 7, bias=False), Transposed()),
    "two": lambda: with_first(nn.Linear(7, 5), LowRank(5, 7), nn.Tanh()),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(7, 5).double()),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(7, 5).double()),
    "transposed": lambda: with_first(nn.ConvTranspose2d(7, 3, 3), nn.Tanh()),
    "one_dimension": lambda: with_first(nn.Linear(7, 5), nn.Tanh(), name="bias"),
}


def exact_sigma(weight, variant, dim):
    sides = [dim, 1 - dim] if variant == "bsn" else [dim]
    norms = [torch.linalg.matrix_norm(reference.unfold(weight.detach(), d), 2).item() for d in sides]
    return sum(norms) / len(norms)


def an_input(kind):
    return torch.randn((2, 7, 4, 4) if kind == "transposed" else (2, 7), dtype=torch.float64)


def both(kind="low_rank"):
    """Return layers with torch's norm and with ours, in the same state."""
    theirs, name = KINDS[kind](), "bias" if kind == "one_dimension" else "weight"
    ours = copy.deepcopy(theirs)
    parametrizations.spectral_norm(theirs, name, n_power_iterations=2)
    bssn_fast.spectral_norm(ours, name, n_power_iterations=2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def the_same(theirs, ours, run):
    for layer in (theirs, ours):
        layer.zero_grad()
    torch.testing.assert_close(run(ours), run(theirs))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(p, q)


def step(layer, x):
    loss = layer(x).square().sum()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_torchs(kind):
    theirs, ours = both(kind)
    x = an_input(kind)
    for _ in range(3):
        the_same(theirs, ours, lambda layer: step(layer, x))
        for layer in (theirs, ours):
            torch.optim.SGD(layer.parameters(), lr=1e-3).step()
    for layer in (theirs, ours):
        layer.eval()
    the_same(theirs, ours, lambda layer: step(layer, x))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_the_random_numbers_that_torch_draws(kind):
    layer, name = KINDS[kind](), "bias" if kind == "one_dimension" else "weight"
    drawn = []
    for spectral_norm in (parametrizations.spectral_norm, bssn_fast.spectral_norm):
        torch.manual_seed(0)
        spectral_norm(copy.deepcopy(layer), name)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("kind", ["low_rank", "masked", "another_shape", "two", "transposed"])
@pytest.mark.parametrize("variant", ["sn", "bsn"])
def test_apply_normalises_what_the_others_give(kind, variant):
    layer = bssn_fast.apply(KINDS[kind](), variant)
    plain = KINDS[kind]()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.rpartition(".")[2].startswith("_")})
    before, dim = plain.weight.detach(), int(kind == "transposed")
    sigma = exact_sigma(before, variant, dim)
    torch.testing.assert_close(layer.eval().weight.detach(), before / sigma, rtol=1e-2, atol=1e-2)
    assert bssn_fast.sigma(layer)[""].item() == pytest.approx(sigma, rel=1e-2)
    norms = bssn_fast.spectral_norms(layer)[""]
    assert norms.s_out.item() == pytest.approx(exact_sigma(layer.weight, "sn", dim), rel=1e-3)
    shape = "x".join(map(str, before.shape))
    assert f" {shape} " in bssn_fast.summary(layer)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.plain, self.last = KINDS["low_rank"](), nn.Linear(5, 7).double(), KINDS["two"]()

    def forward(self, x):
        return self.last(self.plain(self.first(x).tanh()).tanh())


def nets():
    """Return a model with torch's norms, and one in which `apply` has taken them over."""
    theirs = Net()
    for layer in theirs.children():
        parametrizations.spectral_norm(layer)
    return theirs, bssn_fast.apply(copy.deepcopy(theirs), "sn")


def test_apply_takes_over_torchs_norms_behind_others():
    theirs, ours = nets()
    kinds = [[type(p).__name__ for p in layer.parametrizations.weight] for layer in ours.children()]
    assert [k[:-1] for k in kinds] == [["LowRank"], [], ["LowRank", "Tanh"]]
    assert {k[-1] for k in kinds} == {"SpectralNormalization"}
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = an_input("low_rank")
    for _ in range(2):
        the_same(theirs, ours, lambda net: step(net, x))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(bssn_fast.apply(ours, "sn", only="normalized").state_dict(), strict=True)
    the_same(theirs, ours, lambda net: step(net, x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_repeated_checkpoint_uses_the_vectors_of_its_forward(reentrant):
    _, ours = nets()
    other = copy.deepcopy(ours)
    x, y = an_input("low_rank").requires_grad_(), an_input("low_rank").requires_grad_()

    def run(call):
        (call(x).sum() + call(y).square().sum()).backward()

    run(ours), run(lambda z: checkpoint(other, z, use_reentrant=reentrant))
    for p, q in zip(other.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(other.buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("block", [bssn_fast.cached, lambda _: parametrize.cached()])
def test_one_iteration_in_a_block(block):
    _, ours = nets()
    with torch.no_grad():  # far from converged
        for vector in ours.buffers():
            vector.copy_(nn.functional.normalize(torch.randn_like(vector), dim=0))
    other = copy.deepcopy(ours)
    for layer, alone in zip(ours.children(), other.children(), strict=True):
        expected = alone.weight
        with block(ours):
            results = layer.weight, layer.weight
        for result in results:
            torch.testing.assert_close(result, expected)
        sum(results).sum().backward(), (2 * expected).sum().backward()
    for p, q in zip([*other.parameters(), *other.buffers()], [*ours.parameters(), *ours.buffers()], strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("training", [False, True])
def test_other_parameters_for_a_call(training):
    theirs, ours = nets()
    new = {name: torch.randn_like(p, requires_grad=True) for name, p in ours.named_parameters()}
    x, found = an_input("low_rank"), []
    for net in (theirs.train(training), ours.train(training)):
        result = functional_call(net, new, (x,))
        found.append((result, *torch.autograd.grad(result.sum(), list(new.values()))))
    torch.testing.assert_close(*found)


def test_gradients_of_gradients():
    theirs, ours = nets()
    x = an_input("low_rank").requires_grad_()

    def penalty(net):
        (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        (grad.square().sum() + net(x).sum()).backward()
        return grad.detach()

    the_same(theirs, ours, penalty)


def test_compiled():
    _, ours = nets()
    other, x = copy.deepcopy(ours), an_input("low_rank")
    call = compiled(other)
    for training in (True, True, False):
        ours.train(training), other.train(training)
        the_same(ours, other, lambda net: step(call if net is other else net, x))
    torch.testing.assert_close(bssn_fast.sigma(other), bssn_fast.sigma(ours))


def test_parameters_that_move_alone_are_noticed_in_evaluation():
    _, ours = nets()
    ours.eval()(an_input("low_rank"))
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.randn_like(p))
    for layer in ours.children():
        assert torch.linalg.matrix_norm(layer.weight.detach(), 2).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("hashed", [True, False])  # contents of tensors, which are not looked at on GPUs
def test_evaluation_after_evaluation_is_the_same(hashed, monkeypatch):
    if not hashed:
        monkeypatch.setattr(kept, "contents_of", lambda *_, **__: None)
    for seed in range(20):
        torch.manual_seed(seed)
        layer = bssn_fast.apply(KINDS["low_rank"](), "sn")
        with torch.no_grad():
            for vector in layer.buffers():
                vector.copy_(nn.functional.normalize(torch.randn_like(vector), dim=0))
        x = an_input("low_rank")
        layer(x), layer(x)
        layer.eval()
        assert torch.equal(layer(x), layer(x))


def test_copies_and_files():
    _, ours = nets()
    x = an_input("low_rank")
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        expected = copy.deepcopy(ours)
        the_same(expected, other, lambda net: step(net, x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("parametrized", [True, False])
@pytest.mark.parametrize("spectral_norm", [bssn_fast.spectral_norm, parametrizations.spectral_norm])
def test_a_normalised_checkpoint_and_a_model_that_is_not(strict, parametrized, spectral_norm):
    """Of torch's own message, with `strict=False`, nothing is left: the model would not be normalised."""
    state = nn.ModuleDict({"a": spectral_norm(KINDS["low_rank"]())}).state_dict()
    model = nn.ModuleDict({"a": KINDS["low_rank"]() if parametrized else nn.Linear(7, 5).double()})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"^a\.weight is normalised in the checkpoint.*bssn_fast\.apply"):
        bssn_fast.load_state_dict(model, state, strict=strict)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    for normalise in (bssn_fast.spectral_norm, parametrizations.spectral_norm):
        other = nn.ModuleDict({"a": normalise(KINDS["low_rank"]())})
        bssn_fast.load_state_dict(other, state)
        torch.testing.assert_close(other.state_dict(), state, rtol=0, atol=0)


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
