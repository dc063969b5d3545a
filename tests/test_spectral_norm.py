"""`bssn_fast.spectral_norm` takes the place of torch's function: what torch's own tests of that function ask of it.

Asked of both. Each test runs with and without torch's flag to swap parameters when a module is converted or loaded.
"""

import copy

import pytest
import torch
from support import norm_of, original
from torch import nn
from torch.autograd import gradcheck
from torch.nn.functional import linear
from torch.nn.utils import parametrizations, parametrize

import bssn_fast

remove = parametrize.remove_parametrizations


@pytest.fixture(params=["bssn_fast", "torch"])
def spectral_norm(request):
    return bssn_fast.spectral_norm if request.param == "bssn_fast" else parametrizations.spectral_norm


@pytest.fixture(params=[False, True], ids=["", "swap"], autouse=True)
def swap(request):
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def same(a, b):
    torch.testing.assert_close(a, b)  # tolerances of the dtype, as torch's tests have them
    return True


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("double")
def test_structure(spectral_norm):
    layer = nn.Linear(5, 7)
    assert spectral_norm(layer) is layer
    norm = norm_of(layer)
    assert norm._u.shape == (7,)
    assert {"_u", "_v"} <= set(norm._buffers)
    assert "original" in layer.parametrizations.weight._parameters
    assert layer.weight is not None
    assert "weight" not in layer._buffers
    assert "weight" not in layer._parameters
    assert original(layer).shape == layer.weight.shape
    assert original(layer).stride() == layer.weight.stride()
    layer = remove(layer, "weight")
    assert not hasattr(layer, "parametrizations")
    assert "weight" in layer._parameters


@pytest.mark.usefixtures("double")
def test_twice_on_a_weight_and_on_the_bias(spectral_norm):
    layer = nn.Linear(5, 7)
    for name in ("weight", "weight", "bias"):
        layer = spectral_norm(layer, name)
    same(torch.linalg.vector_norm(layer.bias), torch.tensor(1.0))
    layer = remove(layer, "bias")
    assert "bias" in layer._parameters
    assert parametrize.is_parametrized(layer, "weight")
    assert "weight" not in layer._parameters
    layer = remove(layer, "weight")
    assert "weight" in layer._parameters
    assert not hasattr(layer, "parametrizations")
    assert not parametrize.is_parametrized(layer)


def small(spectral_norm, trained):
    layer = nn.Linear(3, 4)
    layer.weight.requires_grad_(trained)
    layer = spectral_norm(layer)
    return layer, norm_of(layer), torch.randn(2, 3)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("trained", [True, False])
def test_training(spectral_norm, trained):
    layer, norm, x = small(spectral_norm, trained)
    u, v = norm._u.clone(), norm._v.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).sum().backward()
    optimizer.step()
    y = layer(x)
    if trained:
        assert not torch.allclose(u, norm._u)
        assert not torch.allclose(v, norm._v)
        assert torch.autograd.grad(y.sum(), original(layer))[0].any()
    u, v = norm._u.clone(), norm._v.clone()

    def two_forwards(x):
        norm._u.data.copy_(u), norm._v.data.copy_(v)
        return layer(x) + layer(x)

    two_forwards(x.clone().requires_grad_()).sum().backward()
    assert gradcheck(two_forwards, (x.clone().requires_grad_(),), check_batched_grad=False)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("trained", [True, False])
def test_removal_in_evaluation_keeps_the_output(spectral_norm, trained):
    layer, _, x = small(spectral_norm, trained)
    expected = layer(x).detach()
    layer = remove(layer.eval(), "weight")
    same(layer(x), expected)
    spectral_norm(layer)
    for _ in range(3):
        expected = layer(x).detach()
    layer = remove(layer.eval(), "weight")
    same(layer(x), expected)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("trained", [True, False])
def test_evaluation(spectral_norm, trained):
    layer, norm, x = small(spectral_norm, trained)
    layer(x)
    expected = layer(x)
    u, v = norm._u.clone(), norm._v.clone()
    layer.zero_grad()
    layer.eval()
    for _ in range(2):
        same(layer(x), expected)
    same(norm._u, u)
    same(norm._v, v)

    def in_both_modes(x):
        norm._u.data.copy_(u), norm._v.data.copy_(v)
        return sum(layer.train(training)(x) for training in (True, False, True, False))

    assert gradcheck(in_both_modes, (x.clone().requires_grad_(),))
    if trained:
        assert gradcheck(lambda weight: layer(x), (original(layer),))


def outputs(layer, x):
    with torch.no_grad():
        return [layer.train(training)(x) for training in (False, True, True, False)]


@pytest.mark.parametrize("forwards", [0, 3])
def test_state_dict(spectral_norm, forwards):
    x = torch.randn(2, 3)
    layer = spectral_norm(nn.Linear(3, 5)).train()
    for _ in range(forwards):
        layer(x)
    state = copy.deepcopy(layer.state_dict())
    vectors = ["parametrizations.weight.0._u", "parametrizations.weight.0._v"]
    assert set(state) == {"parametrizations.weight.original", "bias", *vectors}
    partial = copy.deepcopy(state)
    partial["nonsense"] = "nonsense"
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "nonsense"'):
        layer.load_state_dict(partial)
    layer.load_state_dict(partial, strict=False)
    for key in ("parametrizations.weight.original", *vectors):
        del partial[key]
        layer.load_state_dict(partial, strict=False)
    partial["weight"] = layer.weight.detach().clone()
    layer.load_state_dict(partial, strict=False)
    del partial._metadata["parametrizations.weight.0"]
    layer.load_state_dict(partial, strict=False)
    for key in ("weight", "bias"):
        del partial[key]
        layer.load_state_dict(partial, strict=False)
    seen = []
    for _ in range(2):
        layer = spectral_norm(remove(layer, "weight"))
        layer.load_state_dict(state)
        seen.append(outputs(layer, x))
    same(*seen)


def test_dimension_of_transposed_convolutions(spectral_norm):
    layer = spectral_norm(nn.ConvTranspose2d(3, 4, (5, 6)))
    layer(torch.randn(2, 3, 10, 12))
    assert norm_of(layer)._u.shape == original(layer)[0, :, 0, 0].shape


def test_other_parameters_of_transposed_convolutions(spectral_norm):
    layer = nn.ConvTranspose2d(3, 4, 2)
    layer.more = nn.Parameter(torch.randn(3, 5))
    spectral_norm(layer, "more")
    assert layer.parametrizations.more[0]._u.shape == (5,)


def test_names_that_end_like_those_of_torchs_hook(spectral_norm):
    module = nn.Module()
    module.w, module.w_orig = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5, 6))
    spectral_norm(module, "w_orig")
    assert dict(module.named_parameters()).keys() == {"w", "parametrizations.w_orig.original"}
    assert module.w_orig.shape == (5, 6)
    spectral_norm(module, "w")
    plain = {"w": torch.randn(3, 4), "w_orig": torch.randn(5, 6)}
    if spectral_norm is bssn_fast.spectral_norm:  # torch does not load plain weights
        module.load_state_dict(plain)
        same(module.parametrizations.w.original.detach(), plain["w"])
        same(module.parametrizations.w_orig.original.detach(), plain["w_orig"])
        remove(remove(module, "w"), "w_orig")
        bssn_fast.load_state_dict(module, plain)
        same(module.w.detach(), plain["w"])


def test_forward(spectral_norm):
    """One power iteration, written out."""
    layer, x = spectral_norm(nn.Linear(5, 7)), torch.randn(3, 5)
    weight = original(layer)
    u = nn.functional.normalize(weight @ norm_of(layer)._v, dim=0, eps=1e-12)
    v = nn.functional.normalize(weight.T @ u, dim=0, eps=1e-12)
    weight.data /= u @ weight @ v
    expected = linear(x, weight, layer.bias)
    same(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float, torch.cfloat])
def test_values(spectral_norm, dtype):
    """The spectral norm of a diagonal matrix is its largest entry."""
    layer = nn.Linear(2, 2, dtype=dtype)
    with torch.no_grad():
        diagonal = layer.weight.diagonal()
        layer.weight = nn.Parameter(torch.diag(diagonal))
        spectral_norm(layer)
        same(layer.weight.data, torch.diag(diagonal / diagonal.abs().max()))
