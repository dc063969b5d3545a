"""Random sequences of what programs do to a model, beside plain torch operations that do the same."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random

import pytest
import torch
from fuzzing import Small, assert_same_vectors, cases, inputs
from support import Plain, assert_same_gradients, norms, original, plain_copy
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import bssn_fast
from bssn_fast import reference

TOLERANCE = 1e-7
LAYERS = ("conv", "linear", "embed")


class Pair:
    """A normalised model, and its twin in plain operations, which iterates when the model must."""

    def __init__(self, seed: int) -> None:
        random.seed(seed), torch.manual_seed(seed)
        self.model = bssn_fast.apply(Small().double(), random.choice(["sn", "ssn", "bsn", "bssn"]))
        self.renewed()
        self.done: list[str] = []

    def both(self):
        return self.model, self.twin

    def called(self):
        """What is called in place of the model, and the twin."""
        return self.both()

    def vectors_follow(self):
        """The twin takes on the model's vectors, which must belong to the weights as they are."""
        plain = norms(self.twin)
        for name, norm in norms(self.model).items():
            weight = original(self.model.get_submodule(name)).detach()
            vectors = tuple(v.clone() for v in norm.buffers())
            for j in range(0, len(vectors), 2):
                pair, dim = vectors[j : j + 2], norm.dim if j == 0 else 1 - norm.dim
                now = reference.spectral_norm(weight, pair, dim)
                then = reference.spectral_norm(weight, reference.power_iteration(weight, pair, dim, 1e-12), dim)
                assert not self.looked_at or now >= 0.85 * then, f"vectors of {name}: {now:.3f} and {then:.3f}"
            plain[name].vectors = vectors

    def renewed(self):
        """The model is another one: its vectors may be estimated at its first use."""
        self.model(inputs())
        self.twin = plain_copy(self.model)
        self.evaluated = False  # the last run was an evaluation
        self.looked_at = False  # the weights have changed since: the next evaluation looks whether vectors belong

    def compare(self, run):
        """Run on both; outputs, gradients and vectors are the same."""
        if not self.model.training:  # there vectors may be estimated, after weights have changed
            with torch.no_grad():
                self.model(inputs())
            self.vectors_follow()
        found = []
        plain = norms(self.twin)
        for norm in plain.values():
            norm.sigma = None
        self.evaluated, self.looked_at = not self.model.training, False
        state = torch.get_rng_state()
        for net, call in zip(self.both(), self.called(), strict=True):
            torch.set_rng_state(state)
            net.zero_grad()
            found.append(run(call))
        torch.testing.assert_close(*found, rtol=TOLERANCE, atol=TOLERANCE)
        assert_same_gradients(*self.both(), TOLERANCE, least=1e-6)  # that of a weight of rank one is zero
        assert_same_vectors(*self.both())
        for name, sigma in bssn_fast.sigma(self.model).items():
            if plain[name].sigma is not None:  # else the layer was not used
                torch.testing.assert_close(sigma, plain[name].sigma, rtol=TOLERANCE, atol=TOLERANCE)

    def change(self, write):
        """Do the same to the weights of both."""
        self.looked_at = self.evaluated and write is not freeze
        state, choice = torch.get_rng_state(), random.getstate()
        for net in self.both():
            torch.set_rng_state(state), random.setstate(choice)
            write(net)


def backward(net, x, create_graph=False):
    out = net(x)
    out.square().sum().backward(create_graph=create_graph)
    return out.detach()


# What is run; each returns what must be the same.


def train(pair):
    x = inputs()
    for net in pair.both():
        net.train()
    pair.compare(lambda net: backward(net, x))


def evaluate(pair):
    x = inputs()
    for net in pair.both():
        net.eval()
    for grad in random.sample([torch.no_grad, torch.inference_mode, torch.enable_grad], 2):
        with grad():
            pair.compare(lambda net: net(x).clone())


def evaluate_with_gradients(pair):
    x = inputs().requires_grad_()
    for net in pair.both():
        net.eval()
    pair.compare(lambda net: backward(net, x))


def without_gradients_in_training(pair):
    x = inputs()
    for net in pair.both():
        net.train()
    with random.choice([torch.no_grad, torch.inference_mode])():
        pair.compare(lambda net: net(x).clone())


def two_forwards(pair):
    x, y = inputs(), inputs()
    for net in pair.both():
        net.train()
    pair.compare(lambda net: backward(lambda z: net(z).sum() - net(y).mean(), x))


def read_alone(pair):
    name = random.choice(LAYERS)
    for net in pair.both():
        net.train(random.random() < 0.5)
    training = pair.model.training
    pair.twin.train(training)

    def run(net):
        weight = net.get_submodule(name).weight
        weight.square().sum().backward() if weight.requires_grad else None
        return weight.detach().clone()

    pair.compare(run)


def with_other_weights(pair):
    """Which a functional call puts in the place of the model's own; training iterates with them."""
    x, factor = inputs(), 1 + 0.2 * random.random()
    for net in pair.both():
        net.train()

    def run(net):
        others = {name: (factor * p.detach()).requires_grad_() for name, p in net.named_parameters()}
        out = torch.func.functional_call(net, others, (x,))
        return [out.detach(), *torch.autograd.grad(out.square().sum(), list(others.values()))]

    pair.compare(run)


def baked(pair):
    """What `remove` leaves, and a copy in evaluation."""
    model, x = copy.deepcopy(pair.model).eval(), inputs()
    twin = bssn_fast.remove(copy.deepcopy(pair.model))
    torch.testing.assert_close(twin(x), model(x), rtol=TOLERANCE, atol=TOLERANCE)


def in_a_block(pair):
    x, y, name = inputs(), inputs(), random.choice(LAYERS)
    torchs = random.random() < 0.5
    for net in pair.both():
        net.train()

    def run(net):
        plain = isinstance(norms(net)["conv"], Plain)
        block = parametrize.cached() if torchs or plain else bssn_fast.cached(net)
        with block:
            out = net(x).sum() + net(y).square().sum() + net.get_submodule(name).weight.sum()
            out.backward()
        return out.detach()

    pair.compare(run)


def checkpointed(pair):
    x, reentrant = inputs().requires_grad_(), random.random() < 0.5
    for net in pair.both():
        net.train()

    def run(net):
        if isinstance(norms(net)["conv"], Plain):  # whose recomputation would iterate again
            return backward(net, x)
        out = checkpoint(net, x, use_reentrant=reentrant)
        out.square().sum().backward()
        return out.detach()

    pair.compare(run)


def autocast(pair):
    """Of a copy in float32: training and evaluation, in calls, blocks and alone, with autocast on and off in turn."""
    model = copy.deepcopy(pair.model).float()
    with torch.no_grad():
        model.eval()(inputs(3, torch.float32))  # vectors may be estimated at the first use
    twin = plain_copy(model)
    for _ in range(4):
        enabled, training, block = (random.random() < p for p in (0.6, 0.7, 0.3))
        x = inputs(3, torch.float32)
        tolerance = 0.05 if enabled else 1e-4
        found = []
        for net in (model, twin):
            net.train(training).zero_grad()
            shared = contextlib.nullcontext()
            if block:
                shared = bssn_fast.cached(net) if net is model else parametrize.cached()
            with shared:
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    out = net(x).float()
                    weight = net.linear.weight.float() if block else net.linear.bias
                (out.square().sum() + weight.sum()).backward()
            found.append(out.detach())
        torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)
        assert_same_gradients(model, twin, 2 * tolerance)
        assert_same_vectors(model, twin)


def failing(pair):
    with pytest.raises(RuntimeError):
        pair.model(torch.randn(3, 5, dtype=torch.float64))
    pair.vectors_follow()  # the call had its iteration, or its look at changed weights


# What is changed.


def step(pair):
    kind = random.choice([torch.optim.SGD, torch.optim.Adam])
    fused = random.random() < 0.5
    train(pair)
    for net in pair.both():
        kind(net.parameters(), lr=0.02, fused=fused).step()


def write_elements(net):
    for p in net.parameters():
        flat = p.detach().numpy().reshape(-1)
        flat[torch.randint(len(flat), (1,)).item()] += 0.1


def cut_channel(net):
    weight = original(net.get_submodule(random.choice(LAYERS)))
    dim = random.randrange(2)
    weight.data.select(dim, torch.randint(weight.shape[dim], (1,)).item()).zero_()


def mask(net):
    weight = original(net.linear)
    weight.data *= torch.ones_like(weight).tril(4)


def clip(net):
    for p in net.parameters():
        p.data.clamp_(-0.9 * float(p.detach().abs().max()) - 1e-3, 0.9 * float(p.detach().abs().max()) + 1e-3)


def polyak(net):
    for p in net.parameters():
        p.data.mul_(0.6).add_(torch.randn_like(p), alpha=0.4)


def counted(net):
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)


def given_other_data(net):  # a tensor of other memory
    for name in LAYERS:
        weight = original(net.get_submodule(name))
        weight.data = weight.data + 0.1 * torch.randn_like(weight)


def freeze(net):
    wanted = random.random() < 0.5
    original(net.get_submodule(random.choice(LAYERS))).requires_grad_(wanted)


def reloaded(pair):
    with torch.no_grad():
        state = {
            k: v + 0.01 * torch.randn_like(v) if "original" in k else v for k, v in pair.model.state_dict().items()
        }
    pair.model.load_state_dict(state, assign=random.random() < 0.3)
    pair.renewed()


def copied(pair):
    by = random.choice([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    pair.model = by(pair.model)
    pair.renewed()


def again(pair):
    bssn_fast.apply(pair.model, random.choice(["sn", "bssn"]), n_power_iterations=random.choice([1, 2]))
    pair.renewed()


def off_and_on(pair):
    bssn_fast.remove(pair.model)
    bssn_fast.apply(pair.model, random.choice(["ssn", "bsn"]))
    pair.renewed()


RUNS = [train, *[evaluate] * 4, evaluate_with_gradients, without_gradients_in_training, two_forwards, read_alone,
        with_other_weights, in_a_block, checkpointed, autocast, failing, baked, step]  # fmt: skip
WRITES = [write_elements, cut_channel, mask, clip, polyak, counted, given_other_data, freeze]
OTHERS = [reloaded, copied, again, off_and_on]


def attempt(seed: int, length: int = 12, pair: Pair | None = None, runs=RUNS, others=OTHERS, writes=WRITES) -> None:
    pair = pair or Pair(seed)
    try:
        for _ in range(length):
            kind = random.choices([runs, writes, others], [6, 5, 1 if others else 0])[0]
            action = random.choice(kind)
            pair.done.append(action.__name__)
            pair.change(action) if kind is writes else action(pair)
    except Exception as fault:
        raise AssertionError(f"seed {seed}: after {' '.join(pair.done)}") from fault


@pytest.mark.parametrize("first", range(4))
def test_states(first):
    for seed in cases(8):
        attempt(1000 * first + seed)


class InFunction:
    """A model called in a function that is compiled, with the model's hooks."""

    def __init__(self, model):
        self.model, self.call = model, torch.compile(lambda x: model(x), backend="aot_eager")

    def __call__(self, x):
        return self.call(x)

    def __getattr__(self, name):
        return getattr(self.model, name)


class CompiledPair(Pair):
    """Half of the runs are those of the compiled model."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        as_module = torch.compile(self.model, backend="aot_eager")
        self.compiled = as_module if seed % 2 else InFunction(self.model)

    def called(self):
        return (self.compiled if random.random() < 0.5 else self.model), self.twin


@pytest.mark.parametrize("seed", cases(2))
def test_states_of_compiled_models(seed):
    torch._dynamo.reset()
    runs = [train, evaluate, evaluate_with_gradients, without_gradients_in_training, two_forwards, read_alone, step]
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.6
    with torch._dynamo.config.patch({limit: 64}):
        attempt(seed, 10, pair=CompiledPair(seed), runs=runs, others=[])


def test_a_fault_would_be_found(monkeypatch):
    """Evaluation that looks at the first element of each tensor alone."""
    from bssn_fast.calls import kept

    contents = kept.contents_of
    monkeypatch.setattr(kept, "contents_of", lambda tensors, **_: contents([t.flatten()[:1] for t in tensors]))
    found = 0
    for seed in range(16):
        with contextlib.suppress(AssertionError):
            attempt(seed)
            continue
        found += 1
    assert found
