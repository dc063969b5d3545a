"""Whoever writes into `layer.weight` sets the weight, as with a plain layer: nothing is lost, and sigma is right."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from support import LAYER_NAMES, Net, images, norm_of, norms, original, same, vectors_of
from test_loading import assert_sigma_right
from torch import nn

import bssn_fast
from bssn_fast.modules import writes

WAYS = {
    "init": lambda layer: nn.init.orthogonal_(layer.weight, gain=3),
    "init_of_data": lambda layer: nn.init.normal_(layer.weight.data, 0.5, 2),
    "no_grad": lambda layer: torch.no_grad()(lambda: layer.weight.uniform_(-1, 3))(),
    "assigned": lambda layer: setattr(layer, "weight", torch.randn_like(layer.weight) * 5),
    "assigned_data": lambda layer: layer.weight.data.copy_(torch.randn_like(layer.weight) * 5),
}


def written(layer, way):
    """Write, and return what the layer's weight must be afterwards."""
    torch.manual_seed(1)
    twin = SimpleNamespace(weight=torch.empty_like(original(layer)).detach())
    WAYS[way](twin)
    torch.manual_seed(1)
    WAYS[way](layer)
    return twin.weight


def use(model):
    model(images()).sum().backward()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", ["forward", "access"])
def test_the_weight_is_what_was_written(way, training, update):
    model = bssn_fast.apply(Net(), update=update)
    model.train(training)
    parameters = [id(p) for p in model.parameters()]
    expected = {}
    for name in LAYER_NAMES:
        expected[name] = written(model.get_submodule(name), way)
    assert [id(p) for p in model.parameters()] == parameters
    for name in LAYER_NAMES:
        assert torch.equal(original(model.get_submodule(name)), expected[name]), name
    model(images())
    assert_sigma_right(model)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "assigned"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update", ["forward", "access"])
def test_a_write_into_a_layer_in_use_is_refused(way, training, update):
    """It may be an increment of the normalised weight. Nothing changes, and the next call is like any other."""
    model = bssn_fast.apply(Net(), update=update)
    use(model)
    model.train(training)
    before, vectors = original(model.first).detach().clone(), vectors_of(model.body)
    WAYS[way](model.first)
    with pytest.raises(RuntimeError, match=r"first: .*weight.original.*changed nothing"):
        model(images())
    assert torch.equal(before, original(model.first))
    assert same(vectors, vectors_of(model.body))
    model(images()).sum().backward()


def test_assignment_to_a_layer_in_use():
    model = bssn_fast.apply(Net())
    use(model)
    assert torch.equal(written(model.first, "assigned"), original(model.first))
    model(images())
    assert_sigma_right(model)


def test_reset_parameters_of_a_layer_in_use():
    model = bssn_fast.apply(Net())
    use(model)
    torch.manual_seed(4)
    model.first.reset_parameters()
    torch.manual_seed(4)
    assert torch.equal(original(model.first), nn.Conv2d(3, 8, 3, padding=1).weight)
    model(images())
    assert_sigma_right(model)


def test_merging_and_unmerging_an_adapter():
    model = bssn_fast.apply(Net())
    use(model)
    before = original(model.first).detach().clone()
    model.first.weight.data += 0.1
    with pytest.raises(RuntimeError, match="changed nothing"):
        model(images())
    assert torch.equal(before, original(model.first))


@pytest.mark.parametrize("training", [True, False])
def test_any_number_of_weights_collected_before_they_are_initialised(training):
    model = bssn_fast.apply(nn.Sequential(*[nn.Linear(3, 3) for _ in range(20)])).train(training)
    weights = [layer.weight for layer in model]
    _ = [layer.weight.norm().item() for layer in model]
    for j, weight in enumerate(weights):
        nn.init.constant_(weight, j + 1.0)
    assert all(torch.equal(original(layer), torch.full((3, 3), j + 1.0)) for j, layer in enumerate(model))


def test_data_replaced():
    model = bssn_fast.apply(Net())
    value = torch.randn(8, 3, 3, 3)
    model.first.weight.data = value
    assert torch.equal(original(model.first), value)
    model.first.weight.data = torch.randn(2, 2)
    with pytest.raises(RuntimeError, match=r"first: .*shape \(2, 2\)"):
        model(images())
    model(images())
    model.first.weight.data = value
    with pytest.raises(RuntimeError, match="changed nothing"):
        model(images())


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_same_values_elsewhere_are_no_write(used, training):
    """torch's function gives `layer.weight.data` another memory format, which does nothing to a weight of torch's."""
    model = bssn_fast.apply(Net()).train(training)
    if used:
        use(model)
    model.train(training)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    model.head.weight.data = model.head.weight.data.clone()
    model(images())
    assert same(before, dict(model.named_parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_a_plot_may_use_the_array_in_a_call(training):
    """What is written in there into a result counts for nothing afterwards."""
    model = bssn_fast.apply(Net())
    use(model)
    model.train(training)

    def plot(layer, args, output):
        array = layer.weight.detach().numpy()
        array -= array.min()

    before = copy.deepcopy(model.state_dict())
    x = images()
    expected = copy.deepcopy(model)(x)
    handle = model.body[3].register_forward_hook(plot)
    model(x)
    handle.remove()
    model.load_state_dict(before)
    assert torch.equal(model(x), expected)


def test_results_are_not_kept():
    model = bssn_fast.apply(Net())
    for _ in range(50):
        _ = model.first.weight.norm().item()
    assert len(writes._watched) <= 1


LOOKS = {
    "parameters": lambda layer: next(p for p in layer.parameters() if p.ndim == 2),
    "model_parameters": lambda layer: next(p for p in nn.Sequential(layer).parameters() if p.ndim == 2),
    "state_dict": lambda layer: nn.Sequential(layer).state_dict()["0.parametrizations.weight.original"],
    "original": lambda layer: layer.parametrizations["weight"].original,
    "deepcopy": lambda layer: original(copy.deepcopy(layer)),
    "deepcopy_of_model": lambda layer: original(copy.deepcopy(nn.Sequential(layer))[0]),
    "to": lambda layer: original(nn.Sequential(layer).to(torch.float64)[0]).float(),
    "removed": lambda layer: bssn_fast.remove(nn.Sequential(layer))[0].weight * 3,
    "applied": lambda layer: original(bssn_fast.apply(nn.Sequential(layer), "bssn")[0]),
    "averaged": lambda layer: original(torch.optim.swa_utils.AveragedModel(nn.Sequential(layer)).module[0]),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_sees_it(look):
    layer = bssn_fast.apply(nn.Linear(3, 3), "sn").eval()
    nn.init.constant_(layer.weight, 1.0)
    assert torch.allclose(LOOKS[look](layer), torch.ones(3, 3))


def test_of_a_model_as_in_dcgan():
    def weights_init(m):
        if type(m).__name__.find("Conv") != -1:
            nn.init.normal_(m.weight.data, 0.0, 0.02)
            nn.init.constant_(m.bias.data, 0)

    model, plain = bssn_fast.apply(Net()), Net()
    torch.manual_seed(5)
    model.apply(weights_init)
    torch.manual_seed(5)
    plain.apply(weights_init)
    assert torch.equal(original(model.body[3]), plain.body[3].weight)
    assert torch.equal(original(model.first), plain.first.weight)
    model(images())
    assert_sigma_right(model)


def test_differentiable_operations_in_place_are_refused():
    """By torch: they would be neither a write nor lost."""
    model = bssn_fast.apply(Net())
    with pytest.raises(RuntimeError, match="modified inplace"):
        model.first.weight.mul_(0.5).sum().backward()


def test_reading_changes_nothing():
    model = bssn_fast.apply(Net()).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name in LAYER_NAMES:
        model.get_submodule(name).weight.norm().item()
    model(images()), model.parameters(), copy.deepcopy(model)
    assert same(before, model.state_dict())


def test_two_writers_are_refused():
    layer = bssn_fast.apply(nn.Linear(3, 3))
    weight, parameter = original(layer), layer.weight
    with torch.no_grad():
        parameter.zero_()
        weight.fill_(1)
    with pytest.raises(RuntimeError, match=r"\(3, 3\).*layer.weight"):
        layer(torch.randn(1, 3))
    assert torch.equal(original(layer), torch.ones(3, 3))
    layer(torch.randn(1, 3))


def test_dead_layers_are_not_kept():
    model = bssn_fast.apply(Net())
    for name in LAYER_NAMES:
        _ = model.get_submodule(name).weight
    gone = weakref.ref(norm_of(model.embed))
    del model, _
    gc.collect()
    assert gone() is None
    writes.settle()
    assert not writes._watched


def test_vectors_of_what_was_written_are_those_of_every_process():
    """No random generator takes part, so that processes that write the same get the same."""
    models = [bssn_fast.apply(Net()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    state = torch.get_rng_state()
    for j, model in enumerate(models):
        torch.manual_seed(j)
        model.first.weight = torch.ones_like(original(model.first))
    torch.set_rng_state(state)
    assert same(vectors_of(models[0]), vectors_of(models[1]))
    assert len(norms(models[0])) == 5
