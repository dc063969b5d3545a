"""Laws of a model's layers: what is kept, saved, loaded, compiled and refused."""

import copy
import warnings

import pytest
import torch
from support import LAYER_NAMES, Net, images, norm_of, original, same
from test_laws import MIXED, mean_sigma_of, sigma_of
from torch import nn
from torch.nn.utils import parametrizations

import bssn_fast


def test_optimizers_see_the_gain_of_a_frozen_weight():
    model = nn.Sequential(nn.Linear(4, 3))
    bssn_fast.apply(model, "sn", gain="learn")
    original(model[0]).requires_grad_(False)
    model(torch.randn(2, 4)).sum().backward()
    assert original(model[0]).grad is None
    assert norm_of(model[0]).gain.grad.any()
    norm_of(model[0]).gain.grad = None
    with torch.no_grad():
        _ = model(torch.randn(2, 4))

    class Inside(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            with torch.enable_grad():
                return self.layer(x)

    outer = bssn_fast.apply(Inside(bssn_fast.remove(model)[0]), "sn", gain="learn")
    norm_of(outer.layer).gain.requires_grad_()
    with torch.no_grad():
        found = outer(torch.randn(2, 4))
    found.sum().backward()  # though the model's call had no graph
    assert norm_of(outer.layer).gain.grad.any()


def test_gains_change_what_evaluation_keeps():
    model = bssn_fast.apply(nn.Sequential(nn.Linear(4, 3)), "sn", gain="learn").eval()
    x = torch.randn(2, 4)
    before = model(x) - model[0].bias
    with bssn_fast.cached(model):
        torch.testing.assert_close(model(x) - model[0].bias, before)
        norm_of(model[0]).gain.data.mul_(2)  # no version is counted
        torch.testing.assert_close(model(x) - model[0].bias, 2 * before)
    norm_of(model[0]).gain.data.mul_(2)
    torch.testing.assert_close(model(x) - model[0].bias, 4 * before)
    assert model.train()(x).grad_fn is not None


def test_a_gain_of_another_call_of_functional_call():
    model = bssn_fast.apply(nn.Sequential(nn.Linear(4, 3, bias=False)), "sn", gain="learn").eval()
    x, key = torch.randn(2, 4), "0.parametrizations.weight.0.gain"
    gain = torch.full((1,), 5.0, requires_grad=True)
    found = torch.func.functional_call(model, {key: gain}, (x,))
    torch.testing.assert_close(found, model(x) * 5 / norm_of(model[0]).gain)
    found.sum().backward()
    torch.testing.assert_close(gain.grad[0], found.detach().sum() / 5)

    def loss(value):
        return torch.func.functional_call(model, {key: value}, (x,)).sum()

    torch.testing.assert_close(torch.func.grad(loss)(gain.detach()), gain.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_gain_in_float32(dtype):
    model = bssn_fast.apply(nn.Sequential(nn.Linear(4, 3)), "sn", gain="learn")
    before = norm_of(model[0]).gain.detach().clone()
    model.to(dtype)
    gain = norm_of(model[0]).gain
    assert gain.dtype == torch.float32
    assert torch.equal(gain, before)
    model(torch.randn(2, 4, dtype=dtype)).sum().backward()
    assert gain.grad.dtype == torch.float32
    gain.data, gain.grad = gain.data.to(dtype), None  # as mixed precision of FSDP has it
    model(torch.randn(2, 4, dtype=dtype)).sum().backward()
    assert gain.grad.dtype == dtype


def test_state_dict_remove_copies_and_other_laws_afterwards():
    model = bssn_fast.apply(Net().double(), "bssn", **MIXED)
    model(images(dtype=torch.float64)).sum().backward()
    with torch.no_grad():
        norm_of(model.head).gain.mul_(1.5)
    model.eval()
    x = images(dtype=torch.float64)
    expected = model(x)
    twin = bssn_fast.apply(Net().double(), "bssn", **MIXED).eval()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    gain = norm_of(model.head).gain
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert any(p is gain for p in optimizer.param_groups[0]["params"])
    bssn_fast.apply(model, "bssn", **MIXED)  # what has been learned stays
    assert norm_of(model.head).gain is gain
    torch.testing.assert_close(model(x), expected)
    bssn_fast.apply(model, "bsn", gain="learn")  # no weight in use changes
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(bssn_fast.remove(model)(x), expected)
    assert not any("gain" in name for name in model.state_dict())
    bssn_fast.apply(model, "sn")
    assert not any("gain" in name for name in model.state_dict())


def test_torchs_norm_becomes_a_gain_that_leaves_the_weight_in_use():
    x = torch.randn(5, 4)
    for variant in ("sn", "bsn"):
        model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.utils.spectral_norm(nn.Linear(3, 2)))
        model(x)
        expected = model.eval()(x)
        torch.testing.assert_close(bssn_fast.apply(model, variant, gain="learn")(x), expected)
        assert [norm_of(layer).gain.item() for layer in model] == pytest.approx([1, 1])


@pytest.mark.parametrize("law", [{"gain": "learn"}, {"at_most": 0.5}, {"at_most": 1e3}])
@pytest.mark.parametrize("variant", ["sn", "bsn"])
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_of_torchs_norms_and_of_plain_models(law, variant, assign):
    x = torch.randn(2, 3, 6)

    def net():
        return nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))

    def normalized_by(function):
        model = net()
        for layer in (model[0], model[2]):
            function(layer)
        model(x)
        return model.eval()

    for saved in (net(), normalized_by(parametrizations.spectral_norm), normalized_by(nn.utils.spectral_norm)):
        model = bssn_fast.apply(net(), variant, **law).eval()
        model.load_state_dict(saved.state_dict(), assign=assign)
        if "gain" in law:
            torch.testing.assert_close(model(x), saved(x))
        elif law["at_most"] == 1e3:
            for name in ("0", "2"):
                layer = saved.get_submodule(name)
                weight = getattr(layer, "weight_orig", None)
                if weight is None:
                    weight = (
                        layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else layer.weight
                    )
                assert torch.equal(model.get_submodule(name).weight, weight)
        else:
            for name in ("0", "2"):
                w = model.get_submodule(name).weight.detach()
                sigma = mean_sigma_of(w) if variant == "bsn" and w.ndim == 3 else sigma_of(w)
                assert sigma <= 0.5 * 1.05


def test_a_checkpoint_with_gains_is_not_loaded_without_them():
    saved = bssn_fast.apply(nn.Sequential(nn.Linear(4, 3)), "sn", gain="learn").state_dict()
    with pytest.raises(RuntimeError, match=r"0\.gain"):
        bssn_fast.apply(nn.Sequential(nn.Linear(4, 3)), "sn").load_state_dict(saved)


def test_compiled_models():
    torch._dynamo.reset()
    model = bssn_fast.apply(Net(), "bssn", **MIXED)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = images()
        torch.testing.assert_close(compiled(x), twin(x))
        for m, call in ((model, compiled), (twin, twin)):
            m.zero_grad()
            call(x).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)
        with torch.no_grad():
            for m in (model, twin):
                for p in m.parameters():
                    p -= 0.01 * p.grad

    def by_hand(w, u, v, s, t, gain):
        return bssn_fast.normalize([w, w], [(u, v), (s, t)], at_most=[None, 0.5], gains=[gain, None])[0]

    w, gain = torch.randn(4, 3), torch.tensor([2.0])
    vectors = [torch.ones(n) / n**0.5 for n in (4, 3, 4, 3)]
    expected = by_hand(w, *[v.clone() for v in vectors], gain)
    found = torch.compile(by_hand, backend="aot_eager", fullgraph=True)(w, *vectors, gain)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_export():
    model = bssn_fast.apply(Net(), "bssn", **MIXED).eval()
    x = images()
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_access_and_torchs_loop_take_the_laws_too():
    model = bssn_fast.apply(Net(), "bssn", update="access", **MIXED)
    twin = bssn_fast.apply(copy.deepcopy(model), "bssn", **MIXED)
    x = images()
    torch.testing.assert_close(model(x), twin(x))


def test_summary_and_repr_tell_the_law():
    model = bssn_fast.apply(Net(), "bssn", **MIXED)
    shown = bssn_fast.summary(model)
    for words in ("bssn x 1.3", "bsn at most 1000", "bsn at most 0.2", "bsn x learned gain"):
        assert words in shown
    assert "at_most=0.2" in repr(model)
    assert "gain='learn'" in repr(model)
    measured = bssn_fast.diagnostics.measure(model.eval())
    model(images())
    for name in LAYER_NAMES:
        variance = model.get_submodule(name).weight.double().var(correction=0).item()
        assert measured[name].variance == pytest.approx(variance, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("bssn", {"scale": 1.2, "at_most": 0.9}), ValueError, ["scale and at_most", "two laws"]),
        (("sn", {"gain": "learn", "at_most": 0.9}), ValueError, ["at_most and gain"]),
        (("bssn", {"gain": "learn", "scale": 1.2}), ValueError, ["scale and gain"]),
        (("ssn", {"at_most": 0.9}), ValueError, ["'ssn'", "at_most", "'sn'"]),
        (("bssn", {"gain": "learn"}), ValueError, ["'bssn'", "gain", "'bsn'"]),
        (("sn", {"scale": {"head": 1.2}}), ValueError, ["'sn' has no scale"]),
        (("ssn", {"scale": {"head": 1.2}, "at_most": {"head": 1}}), ValueError, ["head", "scale and at_most"]),
        (("sn", {"gain": ["head"], "at_most": {"head": 1}}), ValueError, ["head", "at_most and gain"]),
        (("sn", {"at_most": {"haed": 1}}), ValueError, ["'haed'", "'head'"]),
        (("sn", {"at_most": {"head": 1}, "names": ["first"]}), ValueError, ["at_most", "'head'"]),
        (("sn", {"gain": ["haed"]}), ValueError, ["'haed'", "'head'"]),
        (("sn", {"gain": True}), TypeError, ["gain", "'learn'"]),
        (("sn", {"gain": "yes"}), TypeError, ["'learn'"]),
        (("sn", {"gain": [3]}), TypeError, ["'learn'"]),
        (("sn", {"at_most": {"head": -1}}), ValueError, ["at_most['head']", "positive"]),
        (("sn", {"at_most": float("nan")}), ValueError, ["at_most", "positive"]),
        (("sn", {"at_most": {3: 1.0}}), TypeError, ["names of layers", "int"]),
        (("sn", {"at_most": nn.Parameter(torch.ones(()))}), TypeError, ["at_most", "gain"]),
    ],
)
def test_contradictions_are_refused_before_anything_changes(arguments, error, words):
    model = Net()
    before = copy.deepcopy(model.state_dict())
    variant, told = arguments
    with pytest.raises(error) as raised:
        bssn_fast.apply(model, variant, **told)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert same(before, model.state_dict())


def test_laws_of_a_shared_weight_and_of_weights_without_values():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    with pytest.raises(ValueError, match=r"b shares its weight with a, which was given another law"):
        bssn_fast.apply(model, "sn", at_most={"a": 1.0})
    assert not hasattr(model["a"], "parametrizations")
    bssn_fast.apply(model, "sn", gain=["a", "b"])
    assert norm_of(model["a"]) is norm_of(model["b"])
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"0: the weight has no values yet.*materialise"):
        bssn_fast.apply(empty, "sn", gain="learn")
    bssn_fast.apply(empty, "sn", at_most=1.0)


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = bssn_fast.apply(Net(), "bssn", **MIXED)
        for _ in range(2):
            model(images()).sum().backward()


def test_a_gain_replaced_inside_the_models_own_forward():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.gain = nn.Linear(4, 3, bias=False), None

        def forward(self, x):
            if self.gain is None:
                return self.layer(x)
            return torch.func.functional_call(self.layer, {"parametrizations.weight.0.gain": self.gain}, (x,))

    model = bssn_fast.apply(Inside(), "sn", gain="learn").eval()
    x = torch.randn(2, 4)
    before, gain = model(x), norm_of(model.layer).gain
    model.gain = torch.full((1,), 5.0)
    torch.testing.assert_close(model(x), before * 5 / gain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_of_a_gain_stays_in_its_precision(dtype):
    model = bssn_fast.apply(nn.Linear(4, 3), "sn", gain="learn")
    model(torch.randn(2, 4)).sum().backward()
    model.to(dtype)
    gain = norm_of(model).gain
    assert gain.dtype == gain.grad.dtype == torch.float32


def test_numbers_for_gains_are_refused():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="gain"):
        bssn_fast.apply(model, "sn", gain={"0": 2.0})
    assert not nn.utils.parametrize.is_parametrized(model[0])
