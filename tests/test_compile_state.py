"""What is left behind by calls of compiled models: vectors, sigma, results in `cached` blocks, checkpoints."""

import copy

import pytest
import torch
from compiling import as_model, as_part, assert_twins, change_weights, compiled, fresh_compiler, twins
from support import Net, assert_same_gradients, images, in_use, norms, original, same, vectors_of
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import bssn_fast
from bssn_fast import reference


@pytest.fixture(autouse=True)
def _fresh_compiler():
    with fresh_compiler():
        yield


@pytest.mark.parametrize(("ways", "eager_first"), [(as_model, False), (as_part, True)])
def test_cached_around_compiled_calls(ways, eager_first):
    """One iteration for compiled calls and others; a compiled call evaluates again, with a graph of its own."""
    model, twin = twins()
    call = ways(model)
    for step in range(4):
        if step == 2:
            torch.compiler.set_stance("fail_on_recompile")
        x, y, z = images(), images(), images()
        for net, f in ((model, call), (twin, twin)):
            with bssn_fast.cached(net):
                loss = net(z).sum() if eager_first else 0
                (loss + f(x).sum() - f(y).square().sum() + net(z.flip(0)).sum()).backward()
        assert in_use(model) == []
        change_weights(model, twin)
    assert_same_gradients(model, twin, 1e-4)
    assert same(vectors_of(model), vectors_of(twin))


def test_cached_in_a_compiled_function():
    model, twin = twins()

    def f(net, x, y):
        with bssn_fast.cached(net):
            return net(x).sum() - net(y).square().sum()

    call = compiled(f)
    for step in range(4):
        if step == 2:
            torch.compiler.set_stance("fail_on_recompile")
        x, y = images(), images()
        call(model, x, y).backward()
        f(twin, x, y).backward()
        change_weights(model, twin)
    assert_same_gradients(model, twin, 1e-4)
    assert same(vectors_of(model), vectors_of(twin))


@pytest.mark.parametrize(("inside", "order"), [(True, "ee"), (False, "cc"), (False, "ec"), (False, "cec")])
def test_torchs_own_cached_block(inside, order):
    """One iteration for all calls, compiled (c) or not (e), as in the twin that is never compiled."""
    if inside and not hasattr(torch._dynamo.config, "enable_trace_contextlib"):
        pytest.skip("torch 2.6 compiles no context managers that are generators")
    model, twin = twins()

    def call_all(net, calls, *inputs):
        with parametrize.cached():
            return sum(call(x).square().sum() for call, x in zip(calls, inputs, strict=True))

    compiled_call = as_part(model)
    calls = [model if inside or kind == "e" else compiled_call for kind in order]
    f = compiled(call_all) if inside else call_all
    for step in range(4):
        if step == 2:
            torch.compiler.set_stance("fail_on_recompile")
        inputs = [images() for _ in order]
        f(model, calls, *inputs).backward()
        call_all(twin, [twin] * len(order), *inputs).backward()
        change_weights(model, twin)
    assert_same_gradients(model, twin, 1e-4)
    assert same(vectors_of(model), vectors_of(twin))


class Refusing(Net):
    def forward(self, x, refuse=False):
        x = self.body(self.first(x))
        if refuse:
            raise ValueError
        return self.head(x.tanh().flatten(1))


def test_an_exception_that_compiled_code_catches_ends_the_call():
    model, twin = twins(Refusing())

    def called(net, x, refuse):
        try:
            return net(x, refuse)
        except ValueError:
            return x

    call = compiled(called)
    for refuse in (False, True, False, False):
        x = images()
        for f, net in ((call, model), (called, twin)):
            y = f(net, x, refuse)
            y.square().sum().backward() if y.requires_grad else None
        assert same(vectors_of(model), vectors_of(twin))
        change_weights(model, twin)
    assert_same_gradients(model, twin, 1e-4)


def test_weights_that_change_in_a_cached_block():
    model, twin = twins()
    call = as_part(model)
    x = images()
    with bssn_fast.cached(model), torch.no_grad():
        call(x)
        change_weights(model, twin)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(call(x), twin.eval()(x))
        assert torch.equal(model(x), twin(x))


def test_sigma_and_what_follows_a_compiled_call():
    model, twin = twins()
    call = as_part(model)
    x = images()
    for f in (call, twin):
        f(x).sum().backward()
    twin_sigma = bssn_fast.sigma(twin)
    for name, sigma in bssn_fast.sigma(model).items():
        torch.testing.assert_close(sigma, twin_sigma[name])
    change_weights(model)
    call(x)
    copied = copy.deepcopy(model)
    for net in (model, copied):
        for name, sigma in bssn_fast.sigma(net).items():
            layer = net.get_submodule(name)
            norm = norms(net)[name]
            expected = reference.spectral_norm(original(layer).detach(), tuple(norm.buffers()), norm.dim)
            torch.testing.assert_close(sigma, expected)
    assert f"{bssn_fast.sigma(model)['first'].item():.4g}" in bssn_fast.summary(model)
    expected = model.eval()(x)
    torch.testing.assert_close(bssn_fast.remove(model)(x), expected)


def test_checkpoint_around_the_model():
    """Recomputing would iterate again: torch.compile leaves such a call to the model itself, or refuses."""
    model, twin = twins()

    def f(net, x):
        return checkpoint(net, x, use_reentrant=False).sum()

    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(f)(model, images())
    call = compiled(f, fullgraph=False)
    for _ in range(2):
        x = images()
        call(model, x).backward()
        f(twin, x).backward()
        change_weights(model, twin)
    assert_twins(model, twin)


REFUSED = r"bssn_fast: torch.utils.checkpoint around .* inside the module given"


def test_checkpoint_of_normalize():
    """It changes vectors, of which Dynamo knows nothing: refused, or gradients would be wrong."""
    weights = [torch.randn(3, 4, requires_grad=True)]
    vectors = [(torch.eye(3)[0], torch.eye(4)[0])]

    def f(x):
        return checkpoint(lambda x: bssn_fast.normalize(weights, vectors)[0][0] * x, x, use_reentrant=False).sum()

    with pytest.raises(RuntimeError, match=REFUSED):
        compiled(f)(torch.ones(()))


OPTION = "skip_fwd_side_effects_in_bwd_under_checkpoint"


@pytest.mark.skipif(not hasattr(torch._dynamo.config, OPTION), reason="a torch without this option")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_checkpoint_around_the_model_that_dynamo_accepts(fullgraph):
    model, x = bssn_fast.apply(Net()), images()

    def f(x):
        return checkpoint(model, x, use_reentrant=False).sum()

    with torch._dynamo.config.patch(OPTION, True):
        with pytest.raises(RuntimeError, match=REFUSED):
            compiled(f, fullgraph=fullgraph)(x)
        model.eval()  # does not iterate
        torch.testing.assert_close(compiled(f, fullgraph=fullgraph)(x), f(x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("update", ["forward", "access"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_checkpoint_around_compiled_code(reentrant, update, backend):
    """Each repetition has the vectors of its own forward, of several before one backward pass."""
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    model, twin = twins(net, update=update)
    call = as_part(model, backend=backend)
    for _ in range(3):
        inputs = [torch.randn(4, 5, requires_grad=True) for _ in range(3)]
        for f in (lambda x: checkpoint(call, x, use_reentrant=reentrant), twin):
            sum(f(x).square().sum() for x in inputs).backward()
        change_weights(model, twin)
    assert_same_gradients(model, twin, 1e-4)
    for name, vector in vectors_of(twin).items():
        torch.testing.assert_close(vectors_of(model)[name], vector)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("block", [bssn_fast.cached, lambda _: parametrize.cached()])
def test_checkpoints_around_compiled_calls_in_a_block(block, reentrant):
    model, twin = twins(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
    for u, v in zip(model.buffers(), twin.buffers(), strict=True):  # far from converged
        u.copy_(nn.functional.normalize(torch.randn_like(u), dim=0)), v.copy_(u)
    call = as_part(model)
    for f, net in ((lambda x: checkpoint(call, x, use_reentrant=reentrant), model), (twin, twin)):
        torch.manual_seed(0)
        inputs = [torch.randn(4, 5, requires_grad=True) for _ in range(3)]
        with block(net):
            losses = [f(x).square().sum() for x in inputs[:2]]
        losses.append(f(inputs[2]).sum())
        sum(losses).backward()
    assert_same_gradients(model, twin, 1e-4)


class PartRepeated(Net):
    def forward(self, x):
        x = checkpoint(self.part[0], self.first(x), use_reentrant=True).tanh().flatten(1)
        return self.head(x)


def test_checkpoint_around_a_compiled_part_of_a_model():
    """Its layers had been normalised before: the vectors are those of now, which are right after one forward."""
    model, twin = twins(PartRepeated())
    model.part, twin.part = [as_part(model.body)], [twin.body]
    x = images()
    with pytest.warns(UserWarning, match="bssn_fast: torch.utils.checkpoint repeats a compiled part"):
        model(x).square().sum().backward()
    twin(x).square().sum().backward()
    assert_same_gradients(model, twin, 1e-4)
    assert same(vectors_of(model), vectors_of(twin))


def test_compiled_call_before_a_checkpoint_is_recomputed():
    """The checkpoint is repeated with the vectors of its own forward."""
    model, twin = twins()
    call = as_part(model)
    x, y = images(), images()
    loss, expected = checkpoint(model, x, use_reentrant=False).sum(), twin(x).sum()
    call(y)
    loss.backward(), expected.backward()
    assert_same_gradients(model, twin, 1e-5)
