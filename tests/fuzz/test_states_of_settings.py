"""The same as test_states, with other settings of `apply`, and with more that programs do."""

from __future__ import annotations

import contextlib
import functools
import random

import pytest
import torch
from fuzzing import Small, cases, inputs
from support import original
from test_states import LAYERS, OTHERS, RUNS, WRITES, Pair, attempt, failing
from torch import nn

import bssn_fast


class PairOfSettings(Pair):
    """Laws, rules, groups of gradients, and parts that are normalised apart, chosen at random."""

    def __init__(self, seed: int) -> None:
        random.seed(seed), torch.manual_seed(seed)
        self.model = Small().double()
        settings = {"update": random.choice(["forward", "access"]), "gradient_groups": random.choice([1, 2, 3])}
        apart = random.random() < 0.5
        for names in [["conv", "embed"], ["linear"]] if apart else [list(LAYERS)]:
            variant = random.choice(["sn", "ssn", "bsn", "bssn"])
            law = {"at_most": random.uniform(0.3, 1.5)} if variant in ("sn", "bsn") and random.random() < 0.5 else {}
            bssn_fast.apply(self.model, variant, names=names, **settings, **law)
        if random.random() < 0.3:  # a part of the model has a group of its own
            bssn_fast.apply(self.model.linear, "sn", update=settings["update"])
        self.renewed()
        self.done: list[str] = [f"{settings} apart={apart}"]


def penalty(pair):
    """Gradients of gradients."""
    x = inputs().requires_grad_()
    for net in pair.both():
        net.train(random.random() < 0.7)
    pair.twin.train(pair.model.training)

    def run(net):
        (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        return g.detach()

    pair.compare(run)


def parts_of_a_backward(pair):
    """One graph, several backward passes over it, each to some parameters."""
    x, name = inputs(), random.choice(LAYERS)
    for net in pair.both():
        net.train()

    def run(net):
        loss = net(x).square().sum()
        weight = original(net.get_submodule(name))
        if weight.requires_grad:
            loss.backward(inputs=[weight], retain_graph=True)
        loss.backward()
        return loss.detach()

    pair.compare(run)


def frozen_inside(pair):
    """A layer is frozen, or trained, as long as the model's forward is at another one."""
    x, name = inputs(), random.choice(LAYERS[1:])
    for net in pair.both():
        net.train()

    def run(net):
        weight = original(net.get_submodule(name))
        wanted = weight.requires_grad

        def flip(*_):
            weight.requires_grad_(not wanted)

        def back(*_):
            weight.requires_grad_(wanted)

        layer = net.get_submodule(name)
        with contextlib.ExitStack() as stack:
            stack.callback(layer.register_forward_pre_hook(flip).remove)
            stack.callback(layer.register_forward_hook(back, always_call=True).remove)
            out = net(x)
        out.square().sum().backward()
        return out.detach()

    pair.compare(run)


def evaluated_with_other_weights(pair):
    x, factor = inputs(), 1 + 0.2 * random.random()
    for net in pair.both():
        net.eval()

    def run(net):
        others = {name: factor * p.detach() for name, p in net.named_parameters()}
        with torch.no_grad():
            return torch.func.functional_call(net, others, (x,)) + net(x)

    pair.compare(run)


def forward_mode(pair):
    x = inputs()
    for net in pair.both():
        net.eval()

    def run(net):
        parameters = {n: p.detach() for n, p in net.named_parameters()}
        tangents = {n: 0.1 * p.cos() for n, p in parameters.items()}
        call = functools.partial(torch.func.functional_call, net, args=(x,))
        return list(torch.func.jvp(call, (parameters,), (tangents,)))

    pair.compare(run)


# What is changed.


def other_parameter(net):
    layer = net.get_submodule(random.choice(LAYERS)).parametrizations.weight
    old = layer.original
    layer.original = nn.Parameter(1.1 * old.detach() + 0.01, requires_grad=old.requires_grad)


def swapped(net):
    weight = original(net.get_submodule(random.choice(LAYERS)))
    if weight.requires_grad:  # else torch refuses
        torch.utils.swap_tensors(weight, nn.Parameter(0.9 * weight.detach() - 0.01))


def one_vector(net):
    """All parameters come to lie in one tensor."""
    for p in net.parameters():  # torch makes views
        p.data = p.data.contiguous()
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    nn.utils.vector_to_parameters(torch.cat([flat[:1], 1.05 * flat])[1:], net.parameters())


def laid_out_anew(net):
    weight = original(net.conv)
    weight.data = weight.data.contiguous(memory_format=random.choice([torch.channels_last, torch.contiguous_format]))


def assigned(net):
    layer = net.get_submodule(random.choice(LAYERS))
    layer.weight = layer.weight.detach() * 1.2 + 0.02


def own_vectors(pair):
    """Assignment estimates the vectors."""
    assigned(pair.model)
    pair.renewed()


def to_single_and_back(pair):
    pair.model.float().double()
    pair.renewed()


MORE_RUNS = [penalty, parts_of_a_backward, frozen_inside, evaluated_with_other_weights, forward_mode]
MORE_WRITES = [other_parameter, swapped, one_vector, laid_out_anew]
MORE_OTHERS = [own_vectors, to_single_and_back]


@pytest.mark.parametrize("first", range(4))
def test_states_of_settings(first):
    for seed in cases(8):
        attempt(
            5000 + 1000 * first + seed,
            pair=PairOfSettings(5000 + 1000 * first + seed),
            runs=[*[run for run in RUNS if run is not failing], *2 * MORE_RUNS],
            others=[*OTHERS, *MORE_OTHERS],
            writes=[*WRITES, *MORE_WRITES],
        )
