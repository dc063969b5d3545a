"""torch.compile: the same results as the model itself, in one graph, compiled once."""

import contextlib

import pytest
import torch
from compiling import (
    as_model,
    as_part,
    assert_twins,
    both_ways,
    change_weights,
    compiled,
    fresh_compiler,
    keeps_reasons,
    twins,
)
from support import Net, images, norms, original, plain_copy, same, vectors_of
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import bssn_fast


@pytest.fixture(autouse=True)
def _fresh_compiler():
    with fresh_compiler():
        yield


@both_ways
def test_a_hundred_steps_of_training_and_evaluation(ways):
    """Bit for bit what the model does itself, two forwards before each backward, and never compiled again."""
    model, twin = twins()
    call = ways(model)
    optimizers = [torch.optim.Adam(net.parameters(), 1e-3) for net in (model, twin)]
    for step in range(100):
        if step == 2:
            graphs = counters["stats"]["unique_graphs"]
            torch.compiler.set_stance("fail_on_recompile")
        x, y = images(), images()
        losses = [net(x).square().mean() - net(y).mean() for net in (call, twin)]
        assert torch.equal(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert_twins(model, twin)
    assert graphs == counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]

    torch.compiler.set_stance("default")
    model.eval(), twin.eval()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(call(x), twin(x))
            assert torch.equal(model(x), twin(x))  # nothing kept from before
    assert same(vectors_of(model), vectors_of(twin))


def test_inductor(launches):
    """Training and evaluation are as near to float64 as they are without a compiler; one call for all layers."""
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(64, 1))
    model, twin = twins(small)
    exact = plain_copy(model).double()
    call = as_part(model, backend="inductor")
    launches.clear()
    for _ in range(3):
        x, y = images(), images()
        for net, f in ((model, call), (twin, twin), (exact, lambda x: exact(x.double()))):
            net.zero_grad()
            (f(x).square().mean() - f(y).mean()).backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.1 * p.grad
    assert launches == [(2, 1)] * 2 * 2 * 3  # two models, two forwards, three steps
    found = [(p.detach() - e).norm() for p, e in zip(model.parameters(), exact.parameters(), strict=True)]
    plain = [(p.detach() - e).norm() for p, e in zip(twin.parameters(), exact.parameters(), strict=True)]
    for error, expected, p in zip(found, plain, exact.parameters(), strict=True):
        assert error <= 3 * expected + 1e-6 * p.norm()
    model.eval(), exact.eval()
    with torch.no_grad():
        torch.testing.assert_close(call(x), exact(x.double()).float(), rtol=1e-5, atol=1e-5)


class Unused(Net):
    def forward(self, x):
        return self.first(x).sum((1, 2, 3))


class Checkpointed(Net):
    def forward(self, x):
        x = checkpoint(self.body, self.first(x), use_reentrant=False).tanh().flatten(1)
        return self.head(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x)).sum((1, 2, 3))


def freeze(model):
    original(model.first).requires_grad_(False)


def not_dense(model):
    original(model.head).data = torch.linspace(-1, 1, 128)[None, ::2]


def some_evaluating(model):
    for _ in range(50):  # else what is evaluated looks for better vectors, which compiled code never does
        model(images())
    model.body.eval()


CASES = {
    # name: (model, settings of `apply`, what is done to model and twin)
    "unused layers": (Unused, {}, None),
    "frozen layer": (Net, {}, freeze),
    "checkpoint inside": (Checkpointed, {}, None),
    "tied": (Tied, {}, None),
    "groups of gradients": (Net, {"gradient_groups": 3}, None),
    "channels_last": (lambda: Net().to(memory_format=torch.channels_last), {}, None),
    "not dense": (Net, {}, not_dense),
    "mixed modes": (Net, {}, some_evaluating),
    "reference": (Net, {"backend": "reference", "variant": "sn", "n_power_iterations": 2}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_kinds_of_models(case):
    check_kind(case, as_part)


def test_unused_layers_of_a_compiled_module():
    check_kind("unused layers", as_model)


def check_kind(case, ways):
    make, settings, prepare = CASES[case]
    model, twin = twins(make(), **settings)
    for net in (model, twin):
        if prepare:
            prepare(net)
    call = ways(model)
    for _ in range(2):
        x = images()
        for f in (call, twin):
            f(x).sum().backward()
        change_weights(model, twin)
    # Some sums of gradients are added in another order.
    assert_twins(model, twin, rtol=1e-5 if case in ("tied", "checkpoint inside") else 0)


def test_inference_mode():
    model, twin = twins()
    call = as_part(model)
    for training in (True, False):
        model.train(training), twin.train(training)
        with torch.inference_mode():
            x = images()
            assert torch.equal(call(x), twin(x))
    x = images()
    for f in (call, twin):
        f(x).sum().backward()
    assert_twins(model, twin)


def train_both(call, model, twin):
    """Four steps of a model, by what has compiled it, and its twin; nothing may be compiled again after two."""
    for step in range(4):
        if step == 2:
            torch.compiler.set_stance("fail_on_recompile")
        x = images()
        for f in (call, twin):
            f(x).sum().backward()
        change_weights(model, twin)


def test_layers_outside_of_a_call_of_the_model():
    model, twin = twins()

    def f(net, x):
        return net.body(net.first(x)).sum() + net.head.weight.square().sum()

    call = compiled(f)
    for step in range(3):
        if step == 2:
            torch.compiler.set_stance("fail_on_recompile")
        x = images()
        call(model, x).backward()
        f(twin, x).backward()
        change_weights(model, twin)
    assert_twins(model, twin)


def test_only_blocks_of_the_model_are_compiled(launches):
    model, twin = twins()
    for block in (model.first, model.body):
        block.compile(backend="aot_eager", fullgraph=True)
    launches.clear()
    train_both(model, model, twin)
    assert_twins(model, twin)
    assert launches == [(5, 1)] * 2 * 4


@both_ways
def test_graph_breaks_in_a_layer(ways):
    class Breaking(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x.tanh()

    net = Net()
    net.body[2] = Breaking()
    model, twin = twins(net)
    call = ways(model, fullgraph=False)
    train_both(call, model, twin)
    assert counters["graph_break"]
    assert_twins(model, twin)


def test_functional_call():
    model, twin = twins()
    given = [{n: p.detach().clone().mul_(2).requires_grad_() for n, p in model.named_parameters()} for _ in range(2)]
    x = images()

    def f(net, parameters):
        return torch.func.functional_call(net, parameters, (x,)).sum()

    compiled(f)(model, given[0]).backward()
    f(twin, given[1]).backward()
    for name in given[0]:
        torch.testing.assert_close(given[0][name].grad, given[1][name].grad)
    assert same(vectors_of(model), vectors_of(twin))


def test_normalize():
    def f(weights, vectors):
        normalized, sigma = bssn_fast.normalize(weights, vectors, scale=2.0)
        return sum(w.square().sum() for w in normalized) * sigma.sum()

    def arguments():
        g = torch.Generator().manual_seed(0)
        weights = [torch.randn(size, generator=g).requires_grad_() for size in ((4, 3, 2), (5, 7))]
        return weights, [[torch.randn(n, generator=g) for n in sizes] for sizes in ((4, 6, 3, 8), (5, 7))]

    (weights, vectors), (others, expected) = arguments(), arguments()
    a, b = compiled(f)(weights, vectors), f(others, expected)
    a.backward(), b.backward()
    assert torch.equal(a, b)
    for found, wanted in zip(vectors, expected, strict=True):
        assert all(map(torch.equal, found, wanted))
    assert all(torch.equal(w.grad, o.grad) for w, o in zip(weights, others, strict=True))


@pytest.mark.parametrize(("dtype", "inside"), [(torch.bfloat16, False), (torch.float16, True)])
def test_autocast(dtype, inside):
    model, twin = twins()

    def f(net, x):
        with torch.autocast("cpu", dtype) if inside else contextlib.nullcontext():
            return net(x).float().sum()

    call, x = compiled(f), images()
    for run, net in ((call, model), (f, twin)):
        with contextlib.nullcontext() if inside else torch.autocast("cpu", dtype):
            loss = run(net, x)
        loss.backward()
    assert_twins(model, twin)


@both_ways
def test_autocast_switched_on_and_off(ways, launches):
    model, twin = twins()
    call = ways(model)
    for on in (False, True, False, True):
        x = images()
        launches.clear()
        for net in (call, twin):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                net(x).float().sum().backward()
        assert launches[len(launches) // 2 :] == ([(4, 1), (1, 1)] if on else [(5, 1)])
        assert launches[: len(launches) // 2] == launches[len(launches) // 2 :]
    assert_twins(model, twin)


def test_half_precision_model():
    model, twin = twins(Net().bfloat16())
    call, x = as_part(model), images(2, torch.bfloat16)
    for f in (call, twin):
        f(x).float().sum().backward()
    assert_twins(model, twin)
    assert all(v.dtype == torch.float32 for p in norms(model).values() for v in p.buffers())


def test_bad_input_is_refused_before_anything_changes():
    model, _ = twins()
    call = as_part(model)
    original(model.head).data = original(model.head).data.double()
    before = vectors_of(model)
    with pytest.raises(Exception, match="without its vectors" if keeps_reasons() else "Observed exception"):
        call(images())
    assert same(before, vectors_of(model))


@pytest.mark.parametrize("law", ["scale", "at_most"])
def test_numbers_that_change_from_call_to_call(law):
    """torch.compile takes a second value of a number for a sign that there will be more, and makes it a symbol."""
    model, twin = twins()
    call, numbers = as_part(model), (1.0, 1.5, 0.3, 1.5, 1.0)
    variant = "ssn" if law == "scale" else "sn"
    for number in numbers:
        x = images()
        for f, net in ((call, model), (twin, twin)):
            bssn_fast.apply(net, variant, **{law: number})
            f(x).sum().backward()
        assert_twins(model, twin)
    weight, vectors = torch.randn(3, 4), (torch.eye(3)[0], torch.eye(4)[0])

    def f(number):
        (normalized,), _ = bssn_fast.normalize([weight], [vectors], n_power_iterations=0, **{law: number})
        return normalized

    call = compiled(f)
    for number in numbers:
        assert torch.equal(call(number), f(number))


@both_ways
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent(kind, ways):
    """torch.compile leaves recurrent layers to torch itself, and with them the call of the model around them."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = kind(5, 4, batch_first=True)

        def forward(self, x):
            return self.inner(x)[0][:, -1]

    model, twin = twins(Last(), names=["inner.weight_ih_l0", "inner.weight_hh_l0"])
    call = ways(model, fullgraph=False)
    for _ in range(2):
        x = torch.randn(3, 6, 5)
        for f in (call, twin):
            f(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert all(map(torch.equal, model.buffers(), twin.buffers()))


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_backward_passes_that_are_compiled():
    """Compiled autograd, of forwards that are not compiled."""
    from torch._dynamo import compiled_autograd

    enable = getattr(compiled_autograd, "_enable", None) or compiled_autograd.enable
    model, twin = twins(nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 3), nn.Linear(3, 200)), update="access")
    x = torch.randn(2, 5)
    with enable(torch.compile(backend="eager")):
        model(x).square().sum().backward()
    twin(x).square().sum().backward()
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad)
