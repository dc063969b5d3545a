"""Measuring: against torch.linalg, against the operator itself, warm vectors, and that nothing changes."""

import copy

import pytest
import torch
from support import LAYER_NAMES, Net, images, same, vectors_of
from torch import nn
from torch.nn.utils import parametrizations

import bssn_fast


def exact(weight, dim=0):
    w = weight.detach().double()
    return (torch.linalg.matrix_norm(w.movedim(d, 0).flatten(1), 2).item() for d in (dim, 1 - dim))


def test_a_plain_model():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    found = bssn_fast.spectral_norms(model)
    assert list(found) == list(LAYER_NAMES)
    for name, norms in found.items():
        layer = model.get_submodule(name)
        s_out, s_in = exact(layer.weight, int(isinstance(layer, nn.ConvTranspose2d)))
        k = layer.weight[0, 0].numel()
        assert norms.s_out.item() == pytest.approx(s_out, rel=2e-3)
        assert norms.s_in.item() == pytest.approx(s_in if k > 1 else s_out, rel=2e-3)
        assert norms.bound.item() == pytest.approx(k**0.5 * min(s_out, s_in if k > 1 else s_out), rel=2e-3)
    assert same(before, model.state_dict())
    assert torch.equal(state, torch.get_rng_state())


KWARGS = [{}, {"stride": 2}, {"dilation": 2}, {"groups": 2}]


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        *((kind, kwargs) for kind in (nn.Conv2d, nn.ConvTranspose2d) for kwargs in KWARGS),
        (nn.Conv2d, {"padding_mode": "circular"}),
    ],
)
def test_the_bound_holds_for_the_operator(kind, kwargs):
    layer = kind(4, 4, 3, padding=1, bias=False, **kwargs).double()
    operator = torch.func.jacrev(layer)(torch.zeros(1, 4, 7, 7, dtype=torch.float64)).flatten(4).flatten(0, 3)
    norms = bssn_fast.spectral_norms(layer)[""]
    largest = torch.linalg.matrix_norm(operator, 2)
    assert 0.3 * norms.bound < largest <= norms.bound * (1 + 1e-3)


def test_the_bound_of_padding_that_repeats_pixels_is_infinite():
    layer = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
    assert bssn_fast.spectral_norms(layer)[""].bound == float("inf")


@pytest.mark.parametrize("variant", ["sn", "bssn"])
@pytest.mark.parametrize("training", [True, False])
def test_a_normalised_model_is_measured_as_it_computes(variant, training):
    model = bssn_fast.apply(Net(), variant).train(training)
    model(images())
    before = vectors_of(model)
    found = bssn_fast.spectral_norms(model)
    assert same(before, vectors_of(model))
    model.eval()
    for name, norms in found.items():
        layer = model.get_submodule(name)
        s_out, _ = exact(layer.weight, int(isinstance(layer, nn.ConvTranspose2d)))
        assert norms.s_out.item() == pytest.approx(s_out, rel=2e-3), name


def test_layers_with_torchs_norms():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 4)), nn.utils.spectral_norm(nn.Linear(4, 3)))
    for _ in range(50):
        model(torch.randn(2, 5))
    vectors = model[0].parametrizations.weight[0]._u.clone()
    found = bssn_fast.spectral_norms(model)
    assert [norms.s_out.item() for norms in found.values()] == pytest.approx([1, 1], rel=1e-3)
    assert torch.equal(vectors, model[0].parametrizations.weight[0]._u)


def test_warm_vectors_follow_the_weights_in_one_call(launches):
    model, warm = Net(), {}
    bssn_fast.spectral_norms(model, vectors=warm)
    launches.clear()
    for _ in range(30):
        with torch.no_grad():
            for p in model.parameters():
                p += 1e-3 * torch.randn_like(p)
        found = bssn_fast.spectral_norms(model, vectors=warm)
    assert launches == [(8, 1)] * 30  # five layers, three of them in both directions
    for name, norms in bssn_fast.spectral_norms(model).items():
        assert found[name].s_out.item() == pytest.approx(norms.s_out.item(), rel=5e-3)
    model.head = nn.Linear(10, 3)  # of another shape: begins anew
    assert bssn_fast.spectral_norms(model, vectors=warm)["head"].s_out.item() == pytest.approx(
        next(exact(model.head.weight)), rel=2e-3
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_and_layouts(dtype):
    layer = nn.Conv2d(6, 5, 3).to(dtype).to(memory_format=torch.channels_last)
    layer.weight = nn.Parameter(layer.weight.detach()[:, ::2])  # not dense
    norms = bssn_fast.spectral_norms(layer)[""]
    assert norms.s_out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norms.s_out.item() == pytest.approx(next(exact(layer.weight)), rel=2e-3)


def test_what_cannot_be_measured_is_named():
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.Linear(3, 3), nn.utils.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"1: the weight already carries"):
        bssn_fast.spectral_norms(model)
    assert list(bssn_fast.spectral_norms(model, names=["0"])) == ["0"]
    with pytest.raises(ValueError, match=r"LayerNorm: .*Leave the layer out"):
        bssn_fast.spectral_norms(nn.LayerNorm(4), names=["weight"])
    with pytest.raises(ValueError, match="nothing to normalise"):
        bssn_fast.spectral_norms(nn.ReLU())


def test_a_negative_gain_has_a_positive_norm():
    model = bssn_fast.apply(nn.Sequential(nn.Conv2d(3, 8, 3)), "sn", gain="learn").eval()
    with torch.no_grad():
        model[0].parametrizations.weight[0].gain.fill_(-2)
    norms, (s_out, s_in) = bssn_fast.spectral_norms(model)["0"], exact(model[0].weight)
    assert norms.s_out.item() == pytest.approx(s_out, rel=2e-3)
    assert norms.s_in.item() == pytest.approx(s_in, rel=2e-3)
    assert norms.bound.item() == pytest.approx(3 * min(s_out, s_in), rel=2e-3)
