"""A model whose weights hold several matrices, for the tests of blocks."""

import torch
from torch import nn

import bssn_fast


class Experts(nn.Module):
    """Three matrices of 5x4 in one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.weight)


class Blocks(nn.Module):
    """Blocks of 15 elements, which begin at any address, of convolutions, of experts, and a layer without."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, (3, 2), groups=2)
        self.qkv = nn.Linear(5, 9)
        self.experts = Experts()
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = self.conv(x).tanh().flatten(1)[:, :5]
        return self.experts(self.head(self.qkv(x).tanh()[:, :4])).sum((1, 2))


BLOCKS = {"conv": 2, "qkv": 3, "experts.weight": 3}


def blocks(variant="bssn", dtype=torch.float64, **settings):
    return bssn_fast.apply(Blocks().to(dtype), variant, blocks=BLOCKS, **settings)


def inputs(n=4, dtype=torch.float64):
    return torch.randn(n, 2, 4, 3, dtype=dtype)
