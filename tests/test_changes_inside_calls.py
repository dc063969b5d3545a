"""What a model's own forward changes or does besides, against torch's spectral_norm in float64, compiled and not."""

import contextlib
import copy

import pytest
import torch
from compiling import as_model, as_part
from support import assert_same_gradients
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import bssn_fast
from bssn_fast.modules.parametrization import SpectralNormalization


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 6, 3), nn.Linear(6 * 16, 2)

    def forward(self, x):
        return self.linear(torch.tanh(self.conv(x)).flatten(1))


class Whole(nn.Module):
    """A generator and its discriminator in one model."""

    def __init__(self):
        super().__init__()
        self.generator, self.part = nn.Conv2d(3, 4, 3, padding=1), Discriminator()
        self.around = contextlib.nullcontext
        self.run = [self.part]  # what is called: the part, or the part compiled

    def forward(self, x):
        x = torch.tanh(self.generator(x))
        with self.around():
            return self.run[0](x)


def torchs(model):
    """The same model with torch's norms, which ours takes over."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            parametrizations.spectral_norm(layer)
    bssn_fast.apply(model, "sn").load_state_dict(twin.state_dict())
    return model, twin


def batch(i=0, dtype=torch.float64):
    return torch.randn(2, 3, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(i))


def train(models, calls=None, steps=3, tolerance=1e-9):
    """Some steps of each model, by the calls given: gradients, u and v stay the same."""
    for i in range(steps):
        for model, call in zip(models, calls or models, strict=True):
            model.zero_grad()
            call(batch(i)).square().sum().backward()
        assert_same_gradients(*models, tolerance)
        state = models[1].state_dict()
        for name, value in models[0].state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=tolerance, atol=tolerance)


def freezing(part, *, other_than=()):
    @contextlib.contextmanager
    def frozen():
        chosen = [p for name, p in part.named_parameters() if name not in other_than]
        for p in chosen:
            p.requires_grad_(False)
        yield
        for p in chosen:
            p.requires_grad_(True)

    return frozen


@pytest.mark.parametrize("case", ["eager", "groups of its own", "part compiled", "compiled"])
def test_a_part_frozen_for_a_while(case):
    """As the discriminator for the generator's loss: it gets no gradients of that, the generator does."""
    torch._dynamo.reset()
    models = torchs(Whole().double())
    for model in models:
        model.around = freezing(model.part)
        model.run = [model.part]
    ours, theirs = models
    call = ours
    if case == "groups of its own":
        bssn_fast.apply(ours.part, "sn")
        ours.load_state_dict(theirs.state_dict())
    elif case == "part compiled":
        ours.run = [as_part(ours.part)]
    elif case == "compiled":
        call = as_model(ours, fullgraph=False)
    train(models, (call, theirs))
    assert ours.part.linear.bias.grad is None
    assert ours.generator.bias.grad is not None


def test_a_part_frozen_in_a_block():
    """The loss of the frozen layers gives their weights nothing, and one backward pass after another is possible."""
    model = bssn_fast.apply(Discriminator().double(), "sn")
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    twin = copy.deepcopy(model)
    twin(x).square().sum().backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    x.grad = None
    with bssn_fast.cached(model):
        loss = model(x).square().sum()
        with freezing(model)():
            model(x).square().sum().backward()
        assert all(p.grad is None for p in model.parameters())
        assert x.grad is not None
        loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_a_weight_frozen_whose_gain_is_trained():
    model = bssn_fast.apply(Whole().double(), "sn", gain="learn")
    names = [name for name, _ in model.part.named_parameters() if name.endswith("gain")]
    model.around = freezing(model.part, other_than=names)
    model(batch()).square().sum().backward()
    assert all(p.grad is not None for name, p in model.part.named_parameters() if name in names)


def test_a_compiled_part_without_autocast():
    """The call has normalised its weights for autocast, and it computes in float32."""
    torch._dynamo.reset()
    models = torchs(Whole())
    for model in models:
        model.run = [model.part]
        model.around = lambda: torch.autocast("cpu", enabled=False)
    ours, theirs = models
    ours.run = [as_part(ours.part)]

    def under_autocast(model):
        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x.float()).float()

        return call

    for model in models:
        model.generator.register_forward_hook(lambda *args: args[-1].float())
    train(models, tuple(map(under_autocast, models)), tolerance=0.05)
    vectors = {name: v for name, v in theirs.named_buffers() if name.startswith("part")}
    for name, v in ours.named_buffers():
        if name in vectors:
            torch.testing.assert_close(v, vectors[name])  # no second iteration


def test_a_compiled_part_with_gradients_in_a_call_without():
    torch._dynamo.reset()
    models = torchs(Whole().double())
    for model in models:
        model.around, model.run = torch.enable_grad, [model.part]
    ours, theirs = models
    ours.run = [as_part(ours.part)]
    train(models, (torch.no_grad()(ours), torch.no_grad()(theirs)))
    assert ours.part.linear.parametrizations.weight.original.grad is not None


class Hyper(nn.Module):
    """Computes with a layer's own weight, and with another one in its place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x):
        other = {"parametrizations.weight.original": 2 * self.linear.parametrizations.weight.original + 1}
        return self.linear(x) + torch.func.functional_call(self.linear, other, (x,))


@pytest.mark.filterwarnings("ignore:bssn_fast. in a call of the model, layer 'linear' is used with another weight")
@pytest.mark.parametrize("way", [as_model, as_part])
def test_a_compiled_forward_that_uses_another_weight(way):
    torch._dynamo.reset()
    models = torchs(Hyper().double())
    for model in models:
        model.eval()
    x = torch.randn(3, 5, dtype=torch.float64)
    ours, theirs = models
    ours(x)  # may estimate vectors
    theirs.load_state_dict(ours.state_dict())
    found = way(ours)(x)
    torch.testing.assert_close(found, theirs(x), rtol=1e-9, atol=1e-9)
    for out in (found, theirs(x)):
        out.square().sum().backward()
    assert_same_gradients(*models, 1e-9)


class Times(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


def followed(models):
    """Each first layer's norm is followed by another parametrization."""
    for model in models:
        parametrize.register_parametrization(model.generator, "weight", Times(), unsafe=True)
    models[0].load_state_dict(models[1].state_dict())
    return models


@pytest.mark.parametrize("way", [as_model, as_part])
def test_a_chain_in_compiled_code_iterates_once(way):
    torch._dynamo.reset()
    models = followed(torchs(Whole().double()))
    train(models, (way(models[0], fullgraph=False), models[1]))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("block", [True, False])
def test_a_chain_with_full_backward_hooks_iterates_once(everywhere, block):
    """They hand a view of the weight on, as it is seen by autograd."""
    models, seen = followed(torchs(Whole().double())), []

    def hook(module, grad_input, grad_output):
        seen.append(module)

    calls = [lambda x, model=model: _twice(model, x) for model in models] if block else models
    with contextlib.ExitStack() as stack:
        handles = [nn.modules.module.register_module_full_backward_hook(hook)] if everywhere else []
        if not everywhere:
            handles = [m.register_full_backward_hook(hook) for model in models for m in model.modules()]
        for handle in handles:
            stack.callback(handle.remove)
        train(models, calls)
    assert models[0].generator.parametrizations.weight[0] in seen


def _twice(model, x):
    """In a block both calls share an iteration: with the same weights twice the result is one call's, times two."""
    ours = isinstance(model.generator.parametrizations.weight[0], SpectralNormalization)
    with bssn_fast.cached(model) if ours else parametrize.cached():
        return model(x) + model(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_of_a_norm_and_of_its_list_run(compiled):
    torch._dynamo.reset()
    models = torchs(Whole().double())
    for model in models:
        model.generator.parametrizations.weight.register_forward_hook(lambda module, args, output: 2 * output)
        model.part.conv.parametrizations.weight[0].register_forward_hook(lambda module, args, output: output.tril())
    ours, theirs = models
    train(models, (as_model(ours, fullgraph=False) if compiled else ours, theirs))


@pytest.mark.parametrize("used", [False, True])
def test_a_layer_that_is_given_another_ones_weight_has_memory_of_its_own(used):
    """torch has the weight take the memory of what is assigned: later writes to it must not reach the other layer."""
    first, second = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
    ours, theirs = torchs(nn.Sequential(first, second))
    for model in (ours, theirs):
        if used:
            model(torch.ones(2, 5, dtype=torch.float64))
        model.eval()
        model[0].weight = model[1].weight
        with torch.no_grad():
            model[0].parametrizations.weight.original.mul_(2)
    weights = [[layer.parametrizations.weight.original for layer in model] for model in (ours, theirs)]
    torch.testing.assert_close(*weights)
    ours(torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(*weights)


class WithLosses(Whole):
    """Each layer has a loss and a backward pass of its own, inside the model's forward."""

    def forward(self, x):
        for layer in (self.generator, self.part.conv):
            x = torch.tanh(layer(x.detach()))
            x.square().sum().backward()
        return self.part.linear(x.detach().flatten(1))


@pytest.mark.parametrize("settings", [{"update": "access"}, {"gradient_groups": 3}])
def test_backward_passes_inside_a_forward(settings):
    ours, theirs = torchs(WithLosses().double())
    bssn_fast.apply(ours, "sn", **settings)
    ours.load_state_dict(theirs.state_dict())
    train((ours, theirs))


def test_backward_passes_inside_a_forward_that_need_one_graph_are_told_what_to_do():
    ours, _ = torchs(WithLosses().double())
    with pytest.raises(RuntimeError, match=r"go backward a second time.*update='access'"):
        ours(batch())
