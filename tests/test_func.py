"""torch.func's transforms of models: plain operations, the numbers of autograd, one iteration in each call."""

import copy

import pytest
import torch
from support import Net, assert_same_gradients, images, norms, original, same, vectors_of
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import bssn_fast

ways = pytest.mark.parametrize("training", [True, False])
updates = pytest.mark.parametrize("update", ["forward", "access"])


def twins(training, **settings):
    model = bssn_fast.apply(Net().double(), **settings).train(training)
    return model, copy.deepcopy(model), images(3, torch.float64)


def assert_twins(model, twin):
    for name, vector in vectors_of(twin).items():
        torch.testing.assert_close(vectors_of(model)[name], vector, msg=name)


@ways
@updates
@pytest.mark.parametrize("buffers", [False, True])
def test_gradients_of_weights(training, update, buffers):
    model, twin, x = twins(training, update=update)
    for _ in range(2):
        given = dict(model.named_parameters()) | (dict(model.named_buffers()) if buffers else {})
        parameters = {n: given.pop(n) for n, _ in model.named_parameters()}

        def loss(p, given=given):
            return functional_call(model, {**p, **given}, (x,)).square().sum()

        for name, found in grad(loss)(parameters).items():
            model.get_parameter(name).grad = found
        twin.zero_grad()
        twin(x).square().sum().backward()
        assert_same_gradients(model, twin, 1e-9)
        assert_twins(model, twin)
    model(x).sum().backward()  # nothing of the transform is left
    assert all(sigma > 0 for sigma in bssn_fast.sigma(model).values())


def test_weight_that_a_transform_has_left_behind():
    """It stands for the tensor that was given to the transform."""
    weight, seen = torch.randn(4, 3, requires_grad=True), []
    grad(lambda w: seen.append(w) or w.sum())(weight)
    (normalized,), _ = bssn_fast.normalize(seen, [(torch.randn(4), torch.randn(3))], backend="reference")
    normalized.square().sum().backward()
    assert weight.grad.any()


@ways
@updates
def test_gradient_penalty(training, update):
    """torch.func gives the gradients of the inputs, and autograd those of the weights through them."""
    model, twin, x = twins(training, update=update)
    grad(lambda x: model(x).sum())(x).square().sum().backward()
    x.requires_grad_()
    (of_x,) = torch.autograd.grad(twin(x).sum(), x, create_graph=True)
    of_x.square().sum().backward(inputs=[p for n, p in twin.named_parameters() if not n.endswith("bias")])
    for norm in norms(twin):
        theirs = original(twin.get_submodule(norm)).grad
        torch.testing.assert_close(original(model.get_submodule(norm)).grad, theirs)
    assert_twins(model, twin)


@ways
def test_gradients_of_each_sample(training):
    model, twin, x = twins(training)
    parameters = dict(model.named_parameters())

    def loss(p, x):
        return functional_call(model, p, (x[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    weights = {n: w.detach() for n, w in parameters.items()}
    with bssn_fast.cached(twin):  # one iteration in all
        for j, sample in enumerate(x):
            twin.zero_grad()
            twin(sample[None]).square().sum().backward(retain_graph=True)
            for name, p in twin.named_parameters():
                torch.testing.assert_close(found[name][j], p.grad, msg=name)
    assert_twins(model, twin)
    assert all(torch.equal(w, model.get_parameter(n)) for n, w in weights.items())


@ways
def test_ensembles(training):
    models = [bssn_fast.apply(Net().double()).train(training) for _ in range(2)]
    x, base = images(3, torch.float64), copy.deepcopy(models[0])
    parameters, buffers = stack_module_state(models)
    found = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([m(x) for m in models]))
    if training:
        before = vectors_of(base)
        with pytest.raises(RuntimeError, match="stack_module_state"):
            vmap(lambda p: functional_call(base, p, (x,)))(parameters)
        assert same(before, vectors_of(base))
        base(x)


@ways
def test_other_transforms(training):
    model, twin, x = twins(training)
    x, direction = x[:1], torch.randn_like(x[:1])
    torch.testing.assert_close(jacrev(model)(x), torch.autograd.functional.jacobian(twin, x))
    assert hessian(lambda x: model(x).sum())(x).isfinite().all()
    parameters = dict(model.named_parameters())
    tangents = {n: torch.randn_like(p) for n, p in parameters.items()}
    vectors = {n: b.clone() for n, b in model.named_buffers()}
    _, found = jvp(lambda p: functional_call(model, p, (x,)).sum(), (parameters,), (tangents,))
    slopes = grad(lambda p: functional_call(model, {**p, **vectors}, (x,)).sum())(parameters)
    torch.testing.assert_close(found, sum((slopes[n] * t).sum() for n, t in tangents.items()))
    _, found = jvp(lambda x: model(x).sum(), (x,), (direction,))
    assert found.isfinite()


@ways
def test_in_a_cached_block(training):
    model, twin, x = twins(training)
    with bssn_fast.cached(model):
        found = [grad(lambda x: model(x).sum())(x), model(x), grad(lambda x: model(x).sum())(x)]
    with bssn_fast.cached(twin):
        expected = twin(x)
    assert_twins(model, twin)
    torch.testing.assert_close(found[1], expected)
    torch.testing.assert_close(found[0], found[2])


def test_before_a_checkpoint():
    """What a transform has normalised is not what the checkpoint recomputes."""
    model, twin, x = twins(True)
    for _ in range(2):
        for net in (model, twin):
            grad(lambda x, net=net: net(x).sum())(x)
        checkpoint(model, x, use_reentrant=False).sum().backward()
        twin(x).sum().backward()
    assert_same_gradients(model, twin, 1e-9)
    model.zero_grad(), twin.zero_grad()
    checkpointed, expected = checkpoint(model, x, use_reentrant=False).sum(), twin(x).sum()
    grad(lambda x: model(x).sum())(x)
    checkpointed.backward(), expected.backward()
    assert_same_gradients(model, twin, 1e-9)


COMPILED = {
    "jvp": lambda net, x: jvp(net, (x,), (x.cos(),))[1],
    "vmap": lambda net, x: vmap(lambda x: net(x[None])[0])(x),
    "penalty": lambda net, x: net(x).sum() + grad(lambda x: net(x).sum())(x).square().sum() + net(-x).sum(),
    "weights": lambda net, x: grad(lambda p: functional_call(net, p, (x,)).square().sum())(
        dict(net.named_parameters())
    )["head.parametrizations.weight.original"],
}


@ways
@pytest.mark.parametrize("transform", COMPILED)
def test_compiled(transform, training):
    """A transform inside of what is compiled, twice: numbers, vectors and gradients are those without a compiler."""
    torch._dynamo.reset()
    model, twin, x = twins(training)
    f = COMPILED[transform]
    call = torch.compile(f, backend="aot_eager", fullgraph=True)
    for i in (1, 2):
        found, expected = call(model, i * x), f(twin, i * x)
        torch.testing.assert_close(found, expected)
        if expected.requires_grad:
            found.sum().backward(), expected.sum().backward()
    assert_same_gradients(model, twin, 1e-9)
    assert_twins(model, twin)


def test_compiled_normalize():
    vectors = [(torch.eye(3)[0], torch.eye(4)[0]) for _ in range(2)]

    def f(weight, own):
        return grad(lambda w: bssn_fast.normalize([w], [own], scale=2.0)[0][0].pow(3).sum())(weight)

    weight = torch.randn(3, 4)
    found = torch.compile(f, backend="aot_eager", fullgraph=True)(weight, vectors[0])
    torch.testing.assert_close(found, f(weight, vectors[1]))
    torch.testing.assert_close(*vectors)
