"""Laws: what a weight is multiplied by, for each weight another function of sigma."""

import copy
import itertools

import pytest
import torch
from support import LAYER_NAMES, Net, images, norm_of, norms, original
from torch import nn

import bssn_fast
from bssn_fast import reference
from bssn_fast.layout import vector_sizes

MIXED = {"scale": {"first": 1.3}, "at_most": {"body.1": 1e3, "body.3": 0.2}, "gain": ["head", "embed"]}
"""A constant, a slack bound, a tight one, and gains."""


def converged(weight, both=False, dim=0):
    """Vectors [of both directions] after so many power iterations that they are exact."""
    start = tuple(torch.randn(n, dtype=weight.dtype) for n in vector_sizes(weight.shape, dim, both))
    vectors = tuple(v / v.norm() for v in start)
    for _ in range(3000):
        vectors = reference.power_iteration(weight, vectors, dim, 1e-12)
    return vectors


def sigma_of(weight):
    return torch.linalg.matrix_norm(weight.flatten(1), 2)


def mean_sigma_of(weight):
    return (sigma_of(weight) + sigma_of(weight.transpose(0, 1))) / 2


def law_in_torch(weight, sigma, scale, at_most):
    return weight * (scale / sigma).clamp(max=1) if at_most else weight * (scale / sigma)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(("relative", "at_most"), [(0.5, True), (2.0, True), (0.5, False), (2.0, False)])
def test_reference_against_singular_values_and_autograd(both, relative, at_most):
    """A bound below and above sigma, and a constant; the gradient is that through `matrix_norm`."""
    weight = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    vectors = converged(weight.detach(), both)
    sigma = (mean_sigma_of if both else sigma_of)(weight)
    scale = (relative * sigma).item()
    expected = law_in_torch(weight, sigma, scale, at_most)
    settings = {"scale": scale, "at_most": at_most, "eps": 1e-12, "n_power_iterations": 0}
    found, _, found_sigma = reference.normalize(weight, vectors, 0, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    if at_most and relative > 1:
        assert torch.equal(found, weight)
    grad = torch.randn_like(weight)
    (expected_grad,) = torch.autograd.grad(expected, weight, grad)
    (autograd,) = torch.autograd.grad(found, weight, grad)
    by_hand = reference.normalize_backward(grad, weight.detach(), vectors, found_sigma.detach(), 0, scale, at_most)
    torch.testing.assert_close(autograd, expected_grad, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(by_hand, expected_grad, rtol=1e-9, atol=1e-10)


def test_a_bound_that_is_sigma_itself_is_slack():
    weight = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    vectors = tuple(torch.tensor([1.0, 0.0], dtype=torch.float64) for _ in range(2))
    for bound, slack in ((3.0, True), (3.0 + 1e-15, True), (3.0 - 1e-15, False)):
        (found,), sigma = bssn_fast.normalize([weight], [[v.clone() for v in vectors]], at_most=bound)
        assert sigma == 3
        assert torch.equal(found, weight) == slack
        leaf = weight.clone().requires_grad_()
        (found,), _ = bssn_fast.normalize([leaf], [[v.clone() for v in vectors]], at_most=bound)
        grad = torch.ones(2, 2, dtype=torch.float64)
        found.backward(grad)
        assert torch.equal(leaf.grad, grad) == slack


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_special_weights(bad, backend):
    """Zero weights are within every bound, and their gradients are those of the identity; no law repairs a NaN."""
    weights = [torch.full((3, 4), bad, requires_grad=True) for _ in range(2)]
    gain = torch.full((1,), 2.0, requires_grad=True)
    vectors = [[torch.ones(3) / 3**0.5, torch.ones(4) / 2] for _ in weights]
    found, _ = bssn_fast.normalize(weights, vectors, at_most=[0.5, None], gains=[None, gain], backend=backend)
    sum(w.sum() for w in found).backward()
    if bad == 0:
        assert not any(w.any() for w in found)
        assert torch.equal(weights[0].grad, torch.ones(3, 4))
        assert not weights[1].grad.any()
        assert not gain.grad.any()
        (plain, _, _) = reference.normalize(
            weights[0], tuple(vectors[0]), 0, scale=0.5, at_most=True, eps=1e-12, n_power_iterations=0
        )
        (grad,) = torch.autograd.grad(plain.sum(), weights[0])
        assert torch.equal(grad, torch.ones(3, 4))
    else:
        assert all(w.isnan().all() for w in found)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_derivatives_of_all_laws_together(backend):
    weights = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3, 2), (3, 5), (5, 2), (2, 3, 2))]
    gain = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    vectors = [converged(w.detach(), w.ndim == 3) for w in weights]

    def normalize(*tensors):
        found, _ = bssn_fast.normalize(
            tensors[:4],
            vectors,
            scale=[1.3, None, None, None],
            at_most=[None, 100, 0.5, None],
            gains=[None, None, None, tensors[4]],
            n_power_iterations=0,
            backend=backend,
        )
        return tuple(found)

    assert torch.autograd.gradcheck(normalize, (*weights, gain))
    assert torch.autograd.gradgradcheck(normalize, (*weights, gain))


def test_mixed_laws_are_one_launch(launches):
    model = bssn_fast.apply(Net(), "bssn", **MIXED)
    launches.clear()
    model(images()).sum().backward()
    assert launches == [(len(LAYER_NAMES), 1)]
    bound = original(model.body[1])
    assert torch.equal(model.eval().body[1].weight, bound)
    weight = model.body[3].weight.detach()
    torch.testing.assert_close(weight, original(model.body[3]) * 0.2 / bssn_fast.sigma(model)["body.3"])


@pytest.mark.parametrize("groups", [1, 3])
def test_a_model_against_plain_torch(groups):
    """Outputs, gradients of weights and of gains, of a model with every law."""
    model = bssn_fast.apply(Net().double(), "bssn", gradient_groups=groups, **MIXED).eval()
    x = images(dtype=torch.float64)
    twin = Net().double()
    twin.load_state_dict(bssn_fast.remove(copy.deepcopy(model)).state_dict())
    leaves, plain = {}, {}
    for name, norm in norms(model).items():
        w = original(model.get_submodule(name)).detach().clone().requires_grad_()
        gain = None if norm.gain is None else norm.gain.detach().clone().requires_grad_()
        leaves[name] = w, gain
        s = norm.settings
        plain[f"{name}.weight"], _, _ = reference.normalize(
            w, tuple(norm.buffers()), norm.dim, scale=s.scale if gain is None else gain, at_most=s.kind == 1,
            eps=1e-12, n_power_iterations=0,
        )  # fmt: skip
    expected = torch.func.functional_call(twin, plain, x)
    found = model(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, norm in norms(model).items():
        w, gain = leaves[name]
        torch.testing.assert_close(original(model.get_submodule(name)).grad, w.grad)
        if gain is not None:
            torch.testing.assert_close(norm.gain.grad, gain.grad)


@pytest.mark.parametrize("variant", ["sn", "bsn"])
def test_a_gain_begins_with_the_weight_as_it_is(variant):
    model = Net().double()
    before = {n: model.get_submodule(n).weight.detach().clone() for n in LAYER_NAMES}
    bssn_fast.apply(model, variant, gain="learn").eval()
    for name in LAYER_NAMES:
        torch.testing.assert_close(model.get_submodule(name).weight, before[name], rtol=1e-12, atol=0)
        gain = norm_of(model.get_submodule(name)).gain
        assert gain.shape == (1,)
        torch.testing.assert_close(gain[0], bssn_fast.sigma(model)[name])
    names = [n for n, _ in model.named_parameters() if n.endswith("gain")]
    assert names == [f"{n}.parametrizations.weight.0.gain" for n in LAYER_NAMES]


def test_a_learned_gain_of_100_steps_is_that_of_plain_torch():
    """float64; the weight's vectors iterate once a step on both sides, and SGD trains weights and gains."""

    class Plain(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.gain = nn.Parameter(norm.gain.detach().clone())
            self.vectors = tuple(v.clone() for v in norm.buffers())

        def forward(self, weight):
            with torch.no_grad():
                u = nn.functional.normalize(weight.flatten(1) @ self.vectors[1], dim=0, eps=1e-12)
                self.vectors = u, nn.functional.normalize(weight.flatten(1).mT @ u, dim=0, eps=1e-12)
            u, v = self.vectors
            return weight * self.gain / (u @ weight.flatten(1) @ v)

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 1)).double()

    model, twin = bssn_fast.apply(net(), "sn", gain="learn"), net()
    for ours, layer in ((model[0], twin[0]), (model[3], twin[3])):
        nn.utils.parametrize.register_parametrization(layer, "weight", Plain(norm_of(ours)), unsafe=True)
    steps = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, twin)]
    for _ in range(100):
        x = torch.randn(8, 2, 8, dtype=torch.float64)
        for m, optimizer in zip((model, twin), steps, strict=True):
            optimizer.zero_grad()
            (m(x) - x.sum((1, 2))[:, None].sin()).square().mean().backward()
            optimizer.step()
    for layer, other in ((model[0], twin[0]), (model[3], twin[3])):
        theirs = other.parametrizations.weight[0].gain
        torch.testing.assert_close(norm_of(layer).gain, theirs, rtol=1e-9, atol=0)
        torch.testing.assert_close(original(layer), original(other), rtol=1e-9, atol=1e-12)
        assert abs(norm_of(layer).gain.item() - 1) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scale": 1.0, "at_most": 1.0}, "weights.0. is given more than one"),
        ({"scale": [1.0]}, "scale has 1 values for 2 weights"),
        ({"gains": torch.ones(2)}, "gains must be a list"),
        ({"gains": [None, torch.ones(2)]}, "gains.1. must be a real tensor of one number"),
        ({"at_most": [None, -1]}, "at_most must be a positive"),
        ({"at_most": [None, nn.Parameter(torch.ones(()))]}, "would not be trained"),
    ],
)
def test_functional_arguments(arguments, words):
    vectors = [[torch.ones(2) / 2**0.5, torch.ones(3) / 3**0.5] for _ in range(2)]
    before = copy.deepcopy(vectors)
    with pytest.raises((ValueError, TypeError), match=words):
        bssn_fast.normalize([torch.randn(2, 3), torch.randn(2, 3)], vectors, **arguments)
    assert all(map(torch.equal, itertools.chain(*vectors), itertools.chain(*before)))


@pytest.mark.parametrize("apply", [True, False])
def test_a_gain_that_is_freed_before_the_backward_pass(apply):
    layer = nn.Linear(4, 6)
    if apply:
        bssn_fast.apply(layer, "sn", gain="learn")
        gain, out = norm_of(layer).gain, layer(torch.randn(2, 4))
    else:
        gain = torch.ones(1, requires_grad=True)
        vectors = [(torch.randn(6), torch.randn(4))]
        (out,), _ = bssn_fast.normalize([layer.weight], vectors, gains=[gain])
    gain.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"memory of a gain of shape \(1,\) was freed"):
        out.sum().backward()
