"""Layers whose weights other parametrizations compute, and ways to run them beside torch's spectral norm."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import bssn_fast
from bssn_fast import reference


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
