"""Projection: what it leaves of the spectral norms, what it costs, and what it refuses."""

import pytest
import torch
from support import Net, images
from torch import nn

import bssn_fast
from bssn_fast import reference


def sigma(weight):
    return torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2).item()


def training(radius=None, at_most=None):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 20), nn.Tanh(), nn.Linear(20, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    projection = bssn_fast.Projection(optimizer, radius=radius, at_most=at_most)
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: projection())
    for _ in range(100):
        optimizer.zero_grad()
        x = torch.randn(16, 3, 6, 6)
        (model(x).squeeze(1) - x.mean((1, 2, 3)) * 20).square().mean().backward()
        optimizer.step()
    return [p for p in model.parameters() if p.ndim > 1]


def test_100_steps_on_the_spectral_sphere():
    for weight in training(radius=1.5):
        assert sigma(weight) == pytest.approx(1.5, abs=1e-3)


def test_100_steps_below_a_bound():
    found = [sigma(weight) for weight in training(at_most=0.8)]
    assert max(found) <= 0.8 + 1e-3
    assert max(found) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("argument", ["at_most", "radius"])
def test_function(dtype, backend, argument):
    """In place, one direction and both; a weight within its bound keeps every bit."""
    working = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [torch.randn(7, 5).to(dtype), torch.randn(300, 400).to(dtype), torch.randn(6, 4, 3, 3).to(dtype)]
    vectors = [[torch.randn(7), torch.randn(5)], [torch.randn(300), torch.randn(400)],
               [torch.randn(6), torch.randn(36), torch.randn(4), torch.randn(54)]]  # fmt: skip
    vectors = [[v.to(working) / v.norm() for v in group] for group in vectors]
    numbers = [1e3, 2.0, 0.5]
    before = [w.clone() for w in weights]
    expected = []
    for w, group, number in zip(before, vectors, numbers, strict=True):
        settings = {"scale": number, "at_most": argument == "at_most", "eps": 1e-12, "n_power_iterations": 2}
        expected.append(reference.normalize(w, tuple(v.clone() for v in group), 0, **settings))
    versions = [w._version for w in weights]
    found = bssn_fast.project_(weights, vectors, **{argument: numbers}, n_power_iterations=2, backend=backend)
    torch.testing.assert_close(found, torch.stack([s for _, _, s in expected]))
    for weight, (value, _, _), version in zip(weights, expected, versions, strict=True):
        torch.testing.assert_close(weight, value)
        assert weight._version > version
    if argument == "at_most":
        assert torch.equal(weights[0], before[0])


def test_parameters_stay_what_they_are():
    model = Net()
    parameters = dict(model.named_parameters())
    projection = bssn_fast.Projection(model, radius={"head": 2.0, "body.3": 1.0})
    first = model.first.weight.detach().clone()
    for _ in range(3):
        model(images()).sum().backward()
        projection()
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert sigma(model.head.weight) == pytest.approx(2, abs=1e-3)
    transposed = model.body[3].weight.transpose(0, 1)
    assert sigma(transposed) == pytest.approx(1, abs=1e-3)
    assert torch.equal(model.first.weight, first)
    assert projection.sigma()["head"].item() == pytest.approx(2, abs=1e-3)
    assert set(projection.vectors) == {"head", "body.3"}


def test_a_change_in_the_middle_of_a_graph_is_noticed_by_autograd():
    layer = nn.Linear(4, 4)
    projection = bssn_fast.Projection(layer, radius=3.0)
    out = (layer(torch.randn(2, 4)) @ layer.weight).sum()
    projection()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "one of at_most and radius"),
        ({"at_most": 1, "radius": 1}, "one of at_most and radius"),
        ({"radius": -1}, "radius must be a positive"),
        ({"radius": [1.0]}, "1 values for 5"),
        ({"radius": {"haed": 1.0}}, "'head'"),
    ],
)
def test_bad_numbers(arguments, words):
    model = Net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        bssn_fast.Projection(model, **arguments)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_weights_that_cannot_be_projected():
    vectors = [[torch.ones(2) / 2**0.5, torch.ones(3) / 3**0.5]]
    with pytest.raises(ValueError, match=r"weights\[0\].*one stretch of memory"):
        bssn_fast.project_([torch.randn(2, 6)[:, ::2]], vectors, radius=1.0)
    with pytest.raises(ValueError, match=r"vectors\[0\].*\(4,\)"):
        bssn_fast.project_([torch.randn(4, 3)], vectors, radius=1.0)
    with pytest.raises(ValueError, match="no weights"):
        bssn_fast.Projection([torch.ones(3)], radius=1.0)
    with pytest.raises(ValueError, match="0: the weight is normalised already"):
        bssn_fast.Projection(bssn_fast.apply(nn.Sequential(nn.Linear(3, 3))), radius=1.0)
    with pytest.raises(TypeError, match="by names goes with a module"):
        bssn_fast.Projection([torch.ones(3, 3)], radius={"a": 1.0})
    layer = nn.Linear(3, 3)
    projection = bssn_fast.Projection(layer, radius=1.0)
    layer.weight.data = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="begin anew"):
        projection()
    pair = torch.randn(4), torch.randn(4)
    for groups in ([pair * 2], [pair, pair]):
        with pytest.raises(ValueError, match="given twice"):
            bssn_fast.project_([torch.randn(4, 4) for _ in groups], groups, radius=1.0)


@pytest.mark.parametrize("change", [lambda m: m[1].double(), lambda m: m[2].half()])
def test_no_weight_changes_after_one_was_converted(change):
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.float64), nn.Linear(8, 8), nn.Linear(8, 8))
    projection = bssn_fast.Projection(model, radius=1.0)
    change(model)
    before = [layer.weight.detach().clone() for layer in model]
    with pytest.raises(RuntimeError, match=r"another shape, precision, device.*begin anew"):
        projection()
    assert all(map(torch.equal, before, [layer.weight for layer in model]))


@pytest.mark.parametrize("tied", [False, True])
def test_no_weight_changes_after_one_was_replaced(tied):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    if tied:
        model[2].weight = model[1].weight
    projection = bssn_fast.Projection(model, radius=1.0)
    model[2].load_state_dict(model[2].state_dict(), assign=True)
    before = [layer.weight.detach().clone() for layer in model]
    with pytest.raises(RuntimeError, match=f"{1 if tied else 2}: the layer has another parameter.*make a new one"):
        projection()
    assert all(map(torch.equal, before, [layer.weight for layer in model]))


def test_an_optimizer_that_gets_more_parameters():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    projection = bssn_fast.Projection(optimizer, radius=1.0)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [second.bias]})  # nothing to project
    projection()
    optimizer.add_param_group({"params": [second.weight]})
    before = first.weight.detach().mul_(2).clone()
    with pytest.raises(RuntimeError, match=r"other parameters.*add_param_group; make a new one"):
        projection()
    assert torch.equal(first.weight, before)
    bssn_fast.Projection(optimizer, radius=1.0)()
    for layer in (first, second):
        assert sigma(layer.weight) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["0", "1.0", "1"])
def test_no_weight_changes_after_a_layer_was_replaced(name):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), nn.Tanh())
    projection = bssn_fast.Projection(model, radius=1.0)
    model[2] = nn.ReLU()
    projection()
    model.set_submodule(name, nn.Linear(8, 8))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=f"^{name}: the module is no longer where it was; make a new Projection"):
        projection()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_weight_is_projected_once(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60)).to(dtype)
    model[1].weight = model[0].weight
    project = bssn_fast.Projection(model, radius=1.0)
    with torch.no_grad():
        model[0].weight.mul_(5)
    for _ in range(20):
        project()
    sigma = torch.linalg.matrix_norm(model[0].weight.detach().float(), 2)
    assert sigma == pytest.approx(1, abs=0.02)


def test_weights_that_share_memory_are_refused():
    weight = nn.Parameter(torch.randn(4, 4))
    before = weight.detach().clone()
    with pytest.raises(ValueError, match="shares memory"):
        bssn_fast.Projection([weight, weight], radius=1.0)
    vectors = [[torch.ones(4) / 2, torch.ones(4) / 2] for _ in range(2)]
    with pytest.raises(ValueError, match="shares memory"):
        bssn_fast.project_([weight, weight], vectors, radius=1.0)
    assert torch.equal(weight, before)
