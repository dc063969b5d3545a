"""Weights that other parametrizations compute before they are normalised, as torch's spectral norm takes them."""

import copy
import pickle

import pytest
import torch
from compiling import compiled
from preceding import KINDS, an_input, both, exact_sigma, nets, step, the_same
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import bssn_fast
from bssn_fast.calls import kept


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
