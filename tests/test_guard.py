"""A guard holds for tensors that kernels can read as they read those before, and for no others."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from bssn_fast.calls.guard import Guard


def parameters():
    return [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(3))]


def test_holds_for_others_like_them():
    first = parameters()
    guard = Guard(first)
    assert guard.holds(first)
    assert guard.holds(parameters())
    first[0].data = torch.randn(4, 6)
    first[1].data.fill_(2)
    assert guard.holds(first)
    with torch.no_grad():
        assert guard.holds(first)


OTHERS = {
    "another shape": torch.ones(6, 4),
    "fewer rows": torch.ones(3, 6),
    "other strides": torch.ones(6, 4).t(),
    "more dimensions": torch.ones(4, 6, 1),
    "fp16": torch.ones(4, 6).half(),
    "fp64": torch.ones(4, 6).double(),
    "complex": torch.ones(4, 6, dtype=torch.complex64),
    "meta": torch.empty(4, 6, device="meta"),
    "negative": torch._neg_view(torch.ones(4, 6)),
    "zeros without memory": torch._efficientzerotensor(4, 6),
    "sparse": torch.ones(4, 6).to_sparse(),
    "no tensor": None,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_does_not_hold_for_what_kernels_would_misread(other):
    plain = torch.randn(4, 6)
    guard = Guard([plain, torch.randn(3)])
    assert guard.holds([plain, torch.randn(3)])
    assert not guard.holds([other, torch.randn(3)])
    assert not guard.holds([plain])


def test_does_not_hold_where_somebody_follows():
    found = parameters()
    guard = Guard(found)
    seen = []

    def look(x):
        seen.append(guard.holds(found) or guard.holds([x, found[1]]))
        return x.sum()

    torch.func.grad(look)(torch.randn(4, 6))
    torch.vmap(look)(torch.randn(2, 4, 6))
    with forward_ad.dual_level():
        seen.append(guard.holds([forward_ad.make_dual(found[0], torch.ones(4, 6)), found[1]]))
    assert seen == [False] * 3


def test_never_holds_without_tensors_or_for_those_that_kernels_cannot_read():
    assert not Guard().holds([])
    for bad in (torch.empty(2, device="meta"), torch._neg_view(torch.randn(2))):
        assert not Guard([bad]).holds([bad])
