"""Weights that there are no kernels for: of one dimension, complex, or with an output dimension beyond the second."""

import copy

import pytest
import torch
from support import VARIANTS, norm_of, original, vectors_of
from torch import nn
from torch.nn.utils import parametrizations

import bssn_fast
from bssn_fast import diagnostics


class Model(nn.Module):
    """One layer of each kind, and an ordinary one; `whole` has a third output dimension, as a converted layer may."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=dtype)
        self.complex = nn.Linear(4, 3, dtype=torch.complex128 if dtype == torch.float64 else torch.complex64)
        self.complex_kernel = nn.Parameter(torch.randn(5, 4, 2, 3, dtype=self.complex.weight.dtype))
        self.gain = nn.Parameter(torch.randn(4, dtype=dtype))
        self.whole = nn.Conv2d(4, 5, (2, 3), bias=False, dtype=dtype)
        parametrizations.spectral_norm(self.whole, dim=-2)

    def forward(self, x):
        x = self.linear(x) * self.gain
        y = torch.einsum(
            "oikl,bi->bo",
            self.complex_kernel,
            self.complex(x.to(self.complex.bias.dtype)).conj_physical()[:, [0, 1, 2, 0]],
        )
        z = nn.functional.conv2d(x[:, :, None, None].expand(-1, -1, 2, 3), self.whole.weight)[:, :, 0, 0]
        return y.abs() + z


NAMES = ("linear", "complex", "complex_kernel", "gain", "whole")


def made(variant="bssn", dtype=torch.float64, **settings):
    return bssn_fast.apply(Model(dtype), variant, names=NAMES, **settings)


def weights(model):
    """By name: the weight before, the one after normalisation, and the output dimension."""
    found = {"complex_kernel": (model.parametrizations.complex_kernel.original, lambda: model.complex_kernel, 0)}
    found["gain"] = model.parametrizations.gain.original, lambda: model.gain, 0
    for name, dim in (("linear", 0), ("complex", 0), ("whole", 2)):
        layer = model.get_submodule(name)
        found[name] = original(layer), lambda layer=layer: layer.weight, dim
    return found


def exact(weight, dim, two_sided):
    """Spectral norms by the singular value decomposition."""
    weight = weight.detach()
    if weight.ndim == 1:
        return weight.norm()
    sides = (dim, int(dim == 0)) if two_sided else (dim,)
    return sum(torch.linalg.matrix_norm(weight.movedim(d, 0).flatten(1), 2) for d in sides) / len(sides)


def inputs(dtype=torch.float64):
    return torch.randn(2, 4, dtype=dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("update", ["forward", "access"])
def test_values(variant, update):
    scale = {"scale": 0.8} if variant in ("ssn", "bssn") else {}
    model = made(variant, n_power_iterations=300, update=update, **scale)
    for _ in range(2):
        model(inputs())
    model.eval()
    model(inputs())
    found = bssn_fast.sigma(model)
    assert set(found) == set(NAMES)
    assert all(value.shape == () and not value.is_complex() for value in found.values())
    for name, (before, after, dim) in weights(model).items():
        sigma = exact(before, dim, variant in ("bsn", "bssn"))
        torch.testing.assert_close(found[name], sigma)
        torch.testing.assert_close(after(), before * scale.get("scale", 1.0) / sigma)


@pytest.mark.parametrize("update", ["forward", "access"])
def test_sn_is_torchs(update):
    """Outputs, gradients and vectors, in steps of training and in evaluation, are those of torch's parametrization."""
    theirs = Model()
    ours = bssn_fast.apply(copy.deepcopy(theirs), "sn", names=NAMES, update=update)
    for module, name in (
        (theirs.linear, "weight"),
        (theirs.complex, "weight"),
        (theirs, "complex_kernel"),
        (theirs, "gain"),
    ):
        parametrizations.spectral_norm(module, name)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs)]
    for training in (True, True, False, True, False):
        x, found = inputs(), []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            y = model.train(training)(x)
            y.square().sum().backward()
            found.append([y.detach(), *[p.grad.clone() for p in model.parameters()]])
            optimizer.step()
        torch.testing.assert_close(*found)
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_once_in_a_call():
    """Two reads in a call of the model: one power iteration, and the same result."""
    model, reads = made("sn"), []
    model.complex.register_forward_hook(lambda m, *_: reads.append(m.weight))
    v, w = norm_of(model.complex)._v.clone(), original(model.complex).detach()
    model.complex.register_forward_hook(lambda m, *_: reads.append(m.weight))
    model(inputs())
    assert reads[0] is reads[1]
    u = nn.functional.normalize(w @ v, dim=0)
    torch.testing.assert_close(norm_of(model.complex)._u, u)
    torch.testing.assert_close(norm_of(model.complex)._v, nn.functional.normalize(w.mH @ u, dim=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_precision_of_one_dimension(dtype):
    weight = torch.randn(50, dtype=dtype)
    model = nn.Module()
    model.weight = nn.Parameter(weight.clone())
    bssn_fast.apply(model, "ssn", names=["weight"], scale=2.0)
    expected = 2 * weight.to(torch.complex128) / weight.to(torch.complex128).norm()
    torch.testing.assert_close(model.weight.to(torch.complex128), expected, atol=0, rtol=2 * torch.finfo(dtype).eps)
    assert not list(model.buffers())


@pytest.mark.parametrize("value", [0.0, 1e-20, float("nan"), float("inf")])
def test_bad_values_of_one_dimension(value):
    layer = bssn_fast.spectral_norm(nn.Linear(3, 3), "bias")
    with torch.no_grad():
        layer.parametrizations.bias.original.fill_(0).view(-1)[1] = value
    expected = (
        torch.zeros(3) if value == 0 else torch.tensor([0, 1e-8, 0]) if value == 1e-20 else torch.full((3,), torch.nan)
    )
    torch.testing.assert_close(layer.bias, expected, equal_nan=True)
    layer.bias.sum().backward()
    grad = layer.parametrizations.bias.original.grad
    assert grad.isfinite().all() or value != value or value == float("inf")
    with torch.no_grad():
        layer.parametrizations.bias.original.copy_(torch.tensor([3.0, 0, 4]))
    torch.testing.assert_close(layer.bias, torch.tensor([0.6, 0, 0.8]))


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_bad_values_spoil_no_vectors(bad):
    model = made()
    before = vectors_of(model)
    values = {name: w.detach().clone() for name, (w, _, _) in weights(model).items()}
    with torch.no_grad():
        for w, _, _ in weights(model).values():
            w.fill_(bad)
    model(inputs())
    assert all(torch.equal(v, before[name]) for name, v in vectors_of(model).items())
    with torch.no_grad():
        for name, (w, _, _) in weights(model).items():
            w.copy_(values[name])
    assert model(inputs()).isfinite().all()


@pytest.mark.parametrize("variant", ["sn", "bssn"])
def test_life_of_a_model(variant):
    """Summary, copies, saving and loading, conversion of dtypes, cached blocks, removal."""
    model, x = made(variant), inputs()
    model(x).sum().backward()
    assert {"4", "3x4", "5x4x2x3"} <= {line.split()[2] for line in bssn_fast.summary(model).splitlines()}
    measured = diagnostics.measure(model)
    for name, (before, after, _) in weights(model.eval()).items():
        variance = after().detach().var(correction=0).item()
        assert measured[name].variance == pytest.approx(variance, rel=0.1)
        assert measured[name].gradient == pytest.approx(before.grad.norm().item())
    expected = model(x)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), expected)
    other = made(variant).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(twin.float()(x.float()).double(), expected, rtol=1e-4, atol=1e-5)
    model.train()
    with bssn_fast.cached(model):
        assert torch.equal(model(x), model(x))
    bssn_fast.apply(model, "bsn", names=NAMES)
    model(x).sum().backward()
    expected, state = model.eval()(x), model.state_dict()
    bssn_fast.remove(model)
    torch.testing.assert_close(model(x), expected)
    assert not list(model.buffers())
    assert {n.rpartition(".")[2] for n in model.state_dict()} == {"weight", "bias", "complex_kernel", "gain"}
    again = made("bsn").eval()
    again.load_state_dict(state)
    torch.testing.assert_close(again(x), expected)


def test_vectors_are_estimated_where_they_are_missing():
    """After loading a plain checkpoint, assigning, and initialising in place."""
    model = made("bssn")
    plain = Model()
    nn.utils.parametrize.remove_parametrizations(plain.whole, "weight", leave_parametrized=False)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert_right(model)
    model = made("bssn")
    model.complex.weight = torch.randn(3, 4, dtype=torch.complex128)
    model.gain = torch.randn(4, dtype=torch.float64)
    assert_right(model)
    model = made("bssn")
    for _, after, _ in weights(model).values():
        nn.init.normal_(after())
    model.eval()(inputs())
    assert_right(model)
    model = made("bssn")
    with torch.no_grad():
        for before, _, _ in weights(model).values():
            before.copy_(torch.randn_like(before))
    assert_right(model)


def assert_right(model):
    model.eval()(inputs())
    found = bssn_fast.sigma(model)
    for name, (before, _, dim) in weights(model).items():
        torch.testing.assert_close(found[name], exact(before, dim, True), rtol=0.01, atol=0)


def test_writes_into_results_in_use_are_refused():
    model = made()
    model(inputs())
    with torch.no_grad():
        model.complex.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"complex.*written to in place"):
        model(inputs())


def test_gradients():
    model = made("bssn").eval()
    x = inputs()
    assert torch.autograd.gradcheck(lambda x: model(x), (x.clone().requires_grad_(),))
    gradient = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())
    found = gradient(dict(model.named_parameters()))
    model.zero_grad()
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_checkpoint_uses_the_vectors_of_its_forward():
    model, x = made("sn"), inputs().requires_grad_()
    twin = copy.deepcopy(model)
    (torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum() + model(x).sum()).backward()
    (twin(x).sum() + twin(x).sum()).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", ["forward", "access"])
def test_checkpoints_around_parts(use_reentrant, training, update):
    class Parts(Model):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=use_reentrant)

    model, x = bssn_fast.apply(Parts(), "sn", names=NAMES, update=update).train(training), inputs().requires_grad_()
    twin = made("sn", update=update).train(training)
    twin.load_state_dict(model.state_dict())
    for _ in range(2):
        for net in (model, twin):
            (net(x).sum() + net(2 * x).sum()).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_export_and_compile():
    model, x = made().eval(), inputs()
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    model.train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager")
    for training in (True, True, False):
        model.train(training), twin.train(training)
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(vectors_of(twin), vectors_of(model))
        torch.testing.assert_close(bssn_fast.sigma(twin), bssn_fast.sigma(model))


def test_autocast_leaves_complex_weights_alone():
    layer = bssn_fast.apply(nn.Linear(3, 3, dtype=torch.complex64))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype == torch.complex64
        layer(torch.randn(1, 3, dtype=torch.complex64))


@pytest.mark.parametrize("kind", ["parametrization", "hook"])
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_conversion_of_any_dimension(kind, dim):
    layer = nn.Conv2d(3, 4, (2, 5)).double()
    if kind == "hook":
        nn.utils.spectral_norm(layer, dim=dim)
        for _ in range(3):
            layer(torch.randn(1, 3, 5, 5, dtype=torch.float64))
    else:
        parametrizations.spectral_norm(layer, dim=dim - 4)
    x, state = torch.randn(1, 3, 5, 5, dtype=torch.float64), copy.deepcopy(layer.state_dict())
    expected = layer.eval()(x)
    bssn_fast.apply(layer, "sn")
    assert norm_of(layer).dim == dim
    torch.testing.assert_close(layer(x), expected)
    fresh = bssn_fast.spectral_norm(nn.Conv2d(3, 4, (2, 5)).double(), dim=dim)
    fresh.load_state_dict(state, strict=True)
    torch.testing.assert_close(fresh.eval()(x), expected)


@pytest.mark.parametrize("kind", ["parametrization", "hook"])
def test_conversion_of_one_dimension(kind):
    layer = nn.Linear(3, 4)
    if kind == "hook":
        nn.utils.spectral_norm(layer, "bias")
        with torch.no_grad():
            layer(torch.randn(1, 3))
    else:
        parametrizations.spectral_norm(layer, "bias")
    expected, state = layer.eval()(torch.ones(1, 3)), copy.deepcopy(layer.state_dict())
    bssn_fast.apply(layer, "sn", names=["bias"])
    torch.testing.assert_close(layer(torch.ones(1, 3)), expected)
    fresh = bssn_fast.apply(nn.Linear(3, 4), "sn", names=["bias"]).eval()
    fresh.load_state_dict(state, strict=True)
    torch.testing.assert_close(fresh(torch.ones(1, 3)), expected)


def test_what_the_function_refuses():
    layer = nn.Linear(3, 4)
    for error, words, arguments in (
        (ValueError, "no parameter named 'wieght'", {"name": "wieght"}),
        (ValueError, "n_power_iterations", {"n_power_iterations": 0}),
        (ValueError, "eps", {"eps": 0.0}),
        (IndexError, "from -2 to 1", {"dim": 2}),
        (IndexError, "from -1 to 0", {"name": "bias", "dim": -2}),
    ):
        with pytest.raises(error, match=words):
            bssn_fast.spectral_norm(layer, **arguments)
        assert not nn.utils.parametrize.is_parametrized(layer)
    bssn_fast.spectral_norm(layer, dim=-1)
    assert norm_of(layer).dim == 1
    with pytest.raises(ValueError, match=r"output dimension 1 already, not 0; remove"):
        bssn_fast.spectral_norm(layer, dim=0)
    bssn_fast.spectral_norm(layer, n_power_iterations=2)  # no dimension asked for: that of the layer
    assert norm_of(layer).settings.n_power_iterations == 2
    assert len(layer.parametrizations.weight) == 1


def test_many_in_one_call_takes_what_there_are_kernels_for():
    for weight, dim in ((torch.randn(3), 0), (torch.randn(3, 3, dtype=torch.cfloat), 0), (torch.randn(3, 3, 3), 2)):
        with pytest.raises(ValueError, match=r"weights\[0\].*bssn_fast\.spectral_norm"):
            bssn_fast.normalize([weight], [(torch.ones(3), torch.ones(3))], dims=dim)
