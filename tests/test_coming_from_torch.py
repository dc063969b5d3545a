"""docs/coming-from-torch.md: what it says of torch is shown on torch, what it says of the package on the package."""

from __future__ import annotations

import copy

import pytest
import torch
from support import norm_of, original, vectors_of
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook_spectral_norm
from torch.nn.utils.spectral_norm import remove_spectral_norm
from torch.utils.checkpoint import checkpoint

import bssn_fast


def layer():
    """A layer whose largest singular value is 4, the next one 1."""
    made = nn.Linear(12, 12, bias=False)
    with torch.no_grad():
        u, _, v = torch.linalg.svd(torch.randn(12, 12))
        made.weight.copy_(u @ torch.diag(torch.tensor([4.0] + [1.0] * 11)) @ v)
    return made


def parametrized():
    return parametrizations.spectral_norm(layer())


def hooked():
    return hook_spectral_norm(layer())


def ours(variant="sn"):
    return bssn_fast.apply(layer(), variant)


def norm(weight):
    return torch.linalg.matrix_norm(weight.detach(), 2).item()


X = torch.ones(2, 12)


def test_evaluation_before_training():
    wrong, right = hooked().eval(), ours().eval()
    wrong(X), right(X)
    assert norm(wrong.weight) > 1.5
    assert norm(right.weight) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_after_one_bad_weight(value):
    def spoil_once(model, weight):
        good = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(value)
            model(X)
            weight.copy_(good)
            for _ in range(3):
                model(X)
        return norm(model.weight) if model.weight.isfinite().all() else None

    model = parametrized()
    assert spoil_once(model, model.parametrizations.weight.original) is None
    model = hooked()
    assert spoil_once(model, model.weight_orig) is None
    model = ours()
    assert spoil_once(model, original(model)) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("make", "iterates"), [(parametrized, True), (hooked, True), (ours, False)])
def test_recomputing_a_checkpoint(make, iterates):
    model = make().double()
    with torch.no_grad():  # far from converged
        next(model.parameters()).copy_(torch.diag(torch.linspace(1, 1.1, 12, dtype=torch.float64)))
    loss = checkpoint(model, X.double().requires_grad_(), use_reentrant=False).sum()
    before = [b.clone() for b in model.buffers()]
    loss.backward()
    assert all(map(torch.equal, before, model.buffers())) != iterates


def test_loading_after_removal():
    plain = layer().state_dict()
    model = remove_spectral_norm(hooked())
    with pytest.raises(RuntimeError, match="weight_orig"):
        model.load_state_dict(plain)
    removed = bssn_fast.remove(bssn_fast.apply(hooked()))
    removed.load_state_dict(plain)
    assert torch.equal(removed.weight, plain["weight"])


def test_initialisation_in_place():
    model = parametrized()
    nn.init.ones_(model.weight)
    assert not torch.equal(model.parametrizations.weight.original, torch.ones(12, 12))
    model = hooked()
    model(X)
    nn.init.ones_(model.weight)
    assert not torch.equal(model.weight_orig, torch.ones(12, 12))
    model = ours()
    nn.init.ones_(model.weight)
    model(X)
    assert torch.equal(original(model).detach(), torch.ones(12, 12))
    assert norm(model.weight) == pytest.approx(1, abs=0.01)


def test_averaged_vectors():
    """The mean of two unit vectors is shorter than they are, and sigma with it."""
    for make, right in ((parametrized, False), (ours, True)):
        model, average = make(), make()
        with torch.no_grad():
            for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                a.lerp_(b, 0.5)
            average.eval()(X)
        assert (abs(norm(average.weight) - 1) < 0.01) == right


def test_half_precision():
    model = parametrized().half()
    assert {b.dtype for b in model.buffers()} == {torch.float16}
    assert {b.dtype for b in ours().half().buffers()} == {torch.float32}


def test_copies_after_a_forward():
    model = hooked()
    model(X)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    model = ours()
    model(X)
    copy.deepcopy(model)(X)


def test_iterations_in_one_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 12, bias=False).double()

        def forward(self, x):
            return self.layer(self.layer(x))

    model = Twice()
    theirs, once = copy.deepcopy(model), bssn_fast.apply(model, "sn")
    parametrizations.spectral_norm(theirs.layer)
    theirs.load_state_dict(once.state_dict())  # the same keys
    begin = vectors_of(once)
    theirs(X.double()), once(X.double())
    u, v = begin["layer._u"], begin["layer._v"]
    seen = []
    for _ in range(2):
        u = nn.functional.normalize(original(once.layer).detach() @ v, dim=0)
        v = nn.functional.normalize(original(once.layer).detach().T @ u, dim=0)
        seen.append(u)
    torch.testing.assert_close(norm_of(once.layer)._u, seen[0])
    torch.testing.assert_close(norm_of(theirs.layer)._u, seen[1])


def test_reads_in_evaluation(launches):
    model = ours().eval()
    model(X)
    del launches[:]
    for _ in range(3):
        model(X)
    assert launches == []
