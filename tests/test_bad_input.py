"""Bad input gives an error that names the layer and the remedy, and leaves the model as it was."""

import copy

import pytest
import torch
from support import Net, images, norm_of, same
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

import bssn_fast
from bssn_fast import backends
from bssn_fast.backends import extension
from bssn_fast.modules.group import groups_of


def snapshot(model):
    """Everything about a model that `apply` changes."""
    return {
        "classes": [type(m) for m in model.modules()],
        "parameters": [(n, id(p)) for n, p in model.named_parameters()],
        "buffers": [(n, id(b)) for n, b in model.named_buffers()],
        "hooks": [
            [list(h.values()) for h in (m._forward_pre_hooks, m._forward_hooks, m._state_dict_hooks)]
            for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "settings": [m.settings for m in model.modules() if hasattr(m, "settings")],
        "groups": [[id(layer) for layer in group._layers] for group in groups_of(model)],
    }


def refuses(model, error, *words, **arguments):
    """Assert that `apply` raises an error with these words in it, and that the model is unchanged, values included."""
    before, random_state = snapshot(model), torch.get_rng_state()
    values = [(p, p.detach().clone()) for p in (*model.parameters(), *model.buffers()) if real(p)]
    with pytest.raises(error) as caught:
        bssn_fast.apply(model, **arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert snapshot(model) == before
    assert all(torch.equal(p, old) for p, old in values)
    assert torch.equal(random_state, torch.get_rng_state())


def real(p):
    return not p.is_meta and not p.is_sparse and not isinstance(p, nn.parameter.UninitializedTensorMixin)


@pytest.fixture(params=["plain", "normalised"])
def model(request):
    return Net() if request.param == "plain" else bssn_fast.apply(Net(), "bsn")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"variant": "bbsn"}, ["'bbsn'", "'sn'", "'bssn'"]),
        ({"variant": "sn", "scale": 1.0}, ["'sn'", "'ssn'"]),
        ({"variant": "bsn", "scale": 2.0}, ["'bsn'", "'bssn'"]),
        ({"variant": ["sn"]}, ["['sn']", "'sn'"]),
        ({"scale": "2"}, ["scale", "'2'"]),
        ({"scale": True}, ["scale", "True"]),
        ({"scale": 0}, ["scale", "positive"]),
        ({"scale": -1.0}, ["scale", "-1"]),
        ({"scale": float("nan")}, ["scale", "nan"]),
        ({"scale": float("inf")}, ["scale", "inf"]),
        ({"scale": torch.ones(2)}, ["scale", "tensor"]),
        ({"scale": 1j}, ["scale", "1j"]),
        ({"eps": 0}, ["eps", "positive"]),
        ({"eps": -1e-12}, ["eps", "positive"]),
        ({"eps": float("nan")}, ["eps", "nan"]),
        ({"eps": float("inf")}, ["eps", "inf"]),
        ({"n_power_iterations": 0}, ["n_power_iterations", "at least 1"]),
        ({"n_power_iterations": -3}, ["n_power_iterations", "-3"]),
        ({"n_power_iterations": 1.5}, ["n_power_iterations", "1.5"]),
        ({"n_power_iterations": True}, ["n_power_iterations", "True"]),
        ({"update": "always"}, ["'always'", "'forward'", "'access'"]),
        ({"names": []}, ["nothing", "Net", "names"]),
        ({"filter_fn": lambda name, module: False}, ["nothing", "Net", "filter_fn"]),
        ({"names": ["body.9"]}, ["'body.9'", "'body.1'"]),
        ({"names": ["body.0"]}, ["body.0", "LeakyReLU", "Conv2d"]),
        ({"names": ["body"]}, ["body", "Sequential"]),
    ],
)
def test_settings(model, arguments, words):
    refuses(model, ValueError, *words, **arguments)


def test_a_scale_to_be_trained(model):
    for scale in (nn.Parameter(torch.tensor(1.5)), 2 * nn.Parameter(torch.tensor(1.5))):
        refuses(model, TypeError, "scale", "would not be trained", "Parameter of your own", scale=scale)
        with pytest.raises(TypeError, match=r"scale.*would not be trained"):
            bssn_fast.normalize([torch.eye(2)], [(torch.ones(2), torch.ones(2))], scale=scale)


@pytest.mark.parametrize("given", [None, {}, nn.ReLU, nn.Parameter(torch.ones(2)), [nn.Linear(2, 2)]], ids=str)
def test_what_is_no_module(given):
    history = bssn_fast.diagnostics.History()
    for function in (
        *(bssn_fast.apply, bssn_fast.remove, bssn_fast.cached, bssn_fast.sigma, bssn_fast.summary),
        *(bssn_fast.spectral_norm, lambda m: bssn_fast.load_state_dict(m, {}), lambda m: history.record(m, 1)),
    ):
        with pytest.raises(TypeError, match=r"^bssn_fast\.\w+ needs a torch\.nn\.Module.* not \S[^\n]+$") as caught:
            function(given)
        assert (given.__name__ if isinstance(given, type) else type(given).__name__) in str(caught.value)


def test_names_given_as_one_string(model):
    refuses(model, TypeError, "names=['head']", names="head")


@pytest.mark.parametrize("name", [0, nn.Linear(3, 3)], ids=["number", "layer"])
def test_names_that_are_no_strings(model, name):
    refuses(model, TypeError, "names", type(name).__name__, "filter_fn", names=["head", name])


def test_filter_that_fails(model):
    refuses(model, ZeroDivisionError, filter_fn=lambda name, module: 1 / 0)


def test_nothing_to_normalise():
    refuses(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), ValueError, "Sequential", "named_modules")


def test_missing_backend(model, monkeypatch):
    refuses(model, bssn_fast.BackendUnavailableError, "'nonsense'", "reference", "cpu", backend="nonsense")
    refuses(model, bssn_fast.BackendUnavailableError, "'triton'", "not cpu", backend="triton")
    refuses(model, bssn_fast.BackendUnavailableError, "'cuda'", "not cpu", backend="cuda")
    monkeypatch.setattr(extension, "module", None)
    backends.forget()
    try:
        refuses(model, bssn_fast.BackendUnavailableError, "'cpu'", "compiler", backend="cpu")
    finally:
        backends.forget()


def with_layer(layer):
    """A model in which layers before and after the bad one are good."""
    return nn.ModuleDict({"before": nn.Linear(3, 3), "bad": layer, "after": nn.Conv2d(3, 3, 3)})


def bad_weight(weight):
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return layer


def hooked(layer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


class DoublingParametrization(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", DoublingParametrization())
    return layer


class HalvingHook(SpectralNorm):
    def compute_weight(self, module, do_power_iteration):
        return super().compute_weight(module, do_power_iteration) / 2


class HalvingParametrization(_SpectralNorm):
    def forward(self, weight):
        return super().forward(weight) / 2


def with_kind(layer, kind):
    """Its spectral norm of torch becomes one of a subclass."""
    found = [*layer._forward_pre_hooks.values(), *layer.modules()]
    next(x for x in found if isinstance(x, kind.__mro__[1])).__class__ = kind
    return layer


def with_vector(layer, name, vector):
    setattr(layer, name, vector)
    return layer


def ours_and_another(layer):
    return parametrized(bssn_fast.apply(layer))


LAYERS = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), ValueError, "remove_parametrizations"),
    "weight_norm_hook": (lambda: hooked(nn.Linear(3, 4)), ValueError, "remove_weight_norm"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), ValueError, "remove_parametrizations"),
    "subclass_of_torchs_hook": (
        lambda: with_kind(nn.utils.spectral_norm(nn.Linear(3, 4)), HalvingHook),
        ValueError,
        "HalvingHook; remove it first (torch.nn.utils.remove_spectral_norm",
    ),
    "subclass_of_torchs_parametrization": (
        lambda: with_kind(parametrizations.spectral_norm(nn.Linear(3, 4)), HalvingParametrization),
        ValueError,
        "HalvingParametrization; call",
    ),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(3, 4), "weight", 0.5), ValueError, "prune.remove"),
    "pruned_before_torch_sn": (
        lambda: prune.l1_unstructured(nn.utils.spectral_norm(nn.Linear(3, 4)), "weight_orig", 0.5),
        ValueError,
        "prune.remove",
    ),
    "torch_sn_with_vectors_of_another_size": (
        lambda: with_vector(nn.utils.spectral_norm(nn.Linear(3, 4)), "weight_u", torch.ones(5)),
        ValueError,
        "remove torch's spectral norm",
    ),
    "integer": (lambda: bad_weight(torch.ones(4, 3, dtype=torch.int32)), TypeError, "int32"),
    "float8": (lambda: bad_weight(torch.ones(4, 3).to(torch.float8_e4m3fn)), TypeError, "float8"),
    "empty": (lambda: bad_weight(torch.ones(0, 3)), ValueError, "empty"),
    "no_dimension": (lambda: bad_weight(torch.tensor(1.0)), ValueError, "no dimensions"),
    "lazy": (lambda: nn.LazyConv2d(4, 3), ValueError, "lazy"),
    "expanded": (lambda: bad_weight(torch.ones(1, 1).expand(4, 3)), ValueError, "clone()"),
    "sparse": (lambda: bad_weight(torch.ones(4, 3).to_sparse()), TypeError, "to_dense()"),
    "renormalised_embedding": (lambda: nn.Embedding(5, 3, max_norm=1.0), ValueError, "max_norm=None"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    make, error, remedy = LAYERS[name]
    model = with_layer(make())
    refuses(model, error, "bad", remedy)
    bssn_fast.apply(model, names=["before", "after"])  # as the message advises
    refuses(model, error, "bad", remedy)


def test_nameless_layer_is_called_by_its_type():
    refuses(nn.LazyLinear(3), ValueError, "LazyLinear")


def test_negative_dimension_of_torchs_spectral_norm_is_understood():
    layer = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3), dim=-4)
    assert norm_of(bssn_fast.apply(layer)).dim == 0


@pytest.mark.parametrize("verb", [bssn_fast.sigma, bssn_fast.summary, bssn_fast.remove])
def test_verbs_on_a_model_that_is_not_normalised(verb):
    model = Net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Net.*bssn_fast.apply"):
        verb(model)
    assert snapshot(model) == before


def test_cached_on_a_model_that_is_not_normalised():
    with pytest.raises(ValueError, match=r"Net.*bssn_fast.apply"), bssn_fast.cached(Net()):
        pass


def test_remove_twice():
    model = bssn_fast.remove(bssn_fast.apply(Net()))
    with pytest.raises(ValueError, match="apply"):
        bssn_fast.remove(model)


def test_vectors_that_do_not_fit_when_loading():
    model = bssn_fast.apply(Net())
    state = copy.deepcopy(model.state_dict())
    state["head.parametrizations.weight.0._u"] = torch.ones(7)
    with pytest.raises(RuntimeError, match=r"head.parametrizations.weight.0._u"):
        model.load_state_dict(state)
    model(images())


def test_another_parametrization_on_top_is_not_dropped_silently():
    model = with_layer(ours_and_another(nn.Linear(3, 4)))
    bssn_fast.apply(model, names=["before", "after"])
    before = model.bad.eval().weight.detach().clone()
    for verb in (bssn_fast.remove, bssn_fast.diagnostics.measure):
        with pytest.raises(ValueError, match=r"bad: .*DoublingParametrization.*del "):
            verb(model)
        assert torch.equal(model.bad.weight, before)
    del model.bad.parametrizations.weight[1:]  # as the message advises
    bssn_fast.diagnostics.measure(model)
    torch.testing.assert_close(2 * bssn_fast.remove(model).bad.weight, before)


@pytest.mark.parametrize("training", [True, False])
def test_assigning_a_weight_of_another_shape(training):
    model = bssn_fast.apply(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False))).train(training)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Conv2d.*\(8, 3, 3, 3\).*\(8, 3, 5, 5\).*bssn_fast\.remove"):
        model[0].weight = torch.randn(8, 3, 5, 5)
    assert same(state, model.state_dict())
    model(torch.randn(1, 3, 4, 4))
