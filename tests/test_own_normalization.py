"""Layers whose class normalises the weight in its own `forward` are refused, other subclasses are not."""

import pytest
import torch
from support import Net
from test_bad_input import refuses
from torch import nn
from torch.nn import functional

import bssn_fast


class Divides:
    """What GAN code often mixes into layers: forward computes with the weight divided by its spectral norm."""

    def register(self, name, shape):
        self.vector_name = name
        self.register_buffer(name, torch.randn(shape))

    def divided(self):
        matrix, u = self.weight.flatten(1), getattr(self, self.vector_name)
        with torch.no_grad():
            v = functional.normalize(matrix.T @ u.flatten(), dim=0)
            u.copy_(functional.normalize(matrix @ v, dim=0).view_as(u))
        return self.weight / (u.flatten() @ matrix @ v)


class DividingConv(Divides, nn.Conv2d):
    def __init__(self, *args, name="u0", shape=(1, -1)):
        super().__init__(*args)
        self.register(name, [self.out_channels if n == -1 else n for n in shape])
        self.register_buffer("sv0", torch.ones(1))

    def forward(self, x):
        return functional.conv2d(x, self.divided(), self.bias)


class DividingLinear(Divides, nn.Linear):
    def __init__(self, *args, name="u"):
        super().__init__(*args)
        self.register(name, [self.out_features])

    def forward(self, x):
        return functional.linear(x, self.divided(), self.bias)


class DividingEmbedding(Divides, nn.Embedding):
    def __init__(self, *args):
        super().__init__(*args)
        self.register("weight_u", [self.num_embeddings])

    def forward(self, x):
        return functional.embedding(x, self.divided())


def used(layer, x):
    layer(x)
    return layer


OWN = {
    "conv": lambda: DividingConv(3, 4, 3),
    "conv_of_one_output": lambda: DividingConv(3, 1, 3),
    "conv_with_a_vector": lambda: DividingConv(3, 4, 3, name="u", shape=[-1]),
    "linear": lambda: DividingLinear(3, 4),
    "embedding": lambda: DividingEmbedding(5, 3),
    "another_name": lambda: used(DividingLinear(3, 4, name="direction"), torch.randn(2, 3)),
}


@pytest.mark.parametrize("name", OWN)
def test_refused(name):
    model = nn.ModuleDict({"before": Net(), "bad": OWN[name]()})
    refuses(model, ValueError, "bad: Dividing", "leave the layer out")
    bssn_fast.apply(model, filter_fn=lambda name, m: name != "bad")  # as the message advises


class LowRank(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.a, self.b = nn.Parameter(torch.randn(2, self.in_features)), nn.Parameter(torch.zeros(self.out_features, 2))

    def forward(self, x):
        return functional.linear(x, self.weight + self.b @ self.a, self.bias)


class EqualLinear(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("scale", torch.tensor(self.in_features**-0.5))

    def forward(self, x):
        return functional.linear(x, self.weight * self.scale, self.bias)


class Quantised(nn.Linear):
    """With a step for each output."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("step", self.weight.detach().abs().amax(1) / 127)
        self.register_buffer("zero_point", torch.zeros(self.out_features, dtype=torch.int32))

    def forward(self, x):
        step = self.step[:, None]
        return functional.linear(x, (self.weight / step).round() * step, self.bias)


class Masked(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask", torch.ones_like(self.weight).tril())

    def forward(self, x):
        return functional.conv2d(x, self.weight * self.mask, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias)


class WithStatistics(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("running_mean", torch.zeros(self.out_features))
        self.register_buffer("running_var", torch.ones(self.out_features))

    def forward(self, x):
        return super().forward(x) - self.running_mean


class WithTorchsNorm(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight, self.bias)


ORDINARY = {
    "low_rank": lambda: LowRank(3, 4),
    "equal": lambda: EqualLinear(3, 4),
    "quantised": lambda: Quantised(3, 4),
    "masked": lambda: Masked(3, 4, 3),
    "masked_of_one_input_and_output": lambda: Masked(1, 1, 3),
    "standardised": lambda: Standardised(3, 4, 3),
    "statistics": lambda: WithStatistics(3, 4),
    "statistics_of_one": lambda: WithStatistics(3, 1),
    "torchs_hook": lambda: nn.utils.spectral_norm(WithTorchsNorm(3, 4)),
    "torchs_parametrization": lambda: nn.utils.parametrizations.spectral_norm(WithTorchsNorm(3, 4)),
    "ours": lambda: bssn_fast.apply(WithTorchsNorm(3, 4)),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_not_refused(name):
    bssn_fast.apply(ORDINARY[name]())
