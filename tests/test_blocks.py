"""Weights that hold several matrices: each block has a sigma, vectors and a law of its own, in the same call."""

import copy

import pytest
import torch
from block_models import BLOCKS, Blocks, Experts, blocks, inputs
from support import Net, assert_same_gradients, images, norm_of, norms, original, plain_copy, same, vectors_of
from torch import nn
from torch.nn.utils import parametrizations

import bssn_fast


def trained(model, steps=3):
    """The model after some steps of training, and the same of plain operations."""
    twin = plain_copy(model)
    optimizers = [torch.optim.SGD(net.parameters(), 1e-4) for net in (model, twin)]
    for step in range(steps):
        x = inputs()
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            net.zero_grad()
            (net(x).square().sum() + net(x).sum()).backward() if step % 2 else net(x).square().sum().backward()
            if step < steps - 1:
                optimizer.step()
    return model, twin


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("variant", ["sn", "ssn", "bsn", "bssn"])
def test_training_is_that_of_the_reference_on_each_block(variant, backend):
    model, twin = trained(blocks(variant, update="access", backend=backend))
    assert_same_gradients(model, twin, 1e-10)
    for name, norm in norms(model).items():
        plain = twin.get_submodule(name).parametrizations.weight[0]
        for ours, theirs in zip(norm.buffers(), plain.vectors, strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(bssn_fast.sigma(model)[name], plain.sigma)
    x = inputs()
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))


def test_sigma_is_that_of_each_matrix_in_float64():
    model = blocks("sn")
    for _ in range(400):
        model(inputs())
    found = bssn_fast.sigma(model)
    torch.testing.assert_close(found["experts"], torch.linalg.matrix_norm(original(model.experts), 2))
    torch.testing.assert_close(found["qkv"], torch.linalg.matrix_norm(original(model.qkv).view(3, 3, 5), 2))
    torch.testing.assert_close(found["conv"], torch.linalg.matrix_norm(original(model.conv).view(2, 3, 6), 2))
    measured = bssn_fast.spectral_norms(model, names=["conv", "qkv", "experts.weight", "head"])
    for name, norm in measured.items():
        torch.testing.assert_close(norm.s_out, torch.ones_like(found[name]), rtol=1e-3, atol=0)
    in_side = original(model.conv).view(2, 3, 1, 6).transpose(1, 2).reshape(2, 1, 18) / found["conv"].view(2, 1, 1)
    torch.testing.assert_close(measured["conv"].s_in, torch.linalg.matrix_norm(in_side, 2), rtol=1e-3, atol=0)
    warm = {}
    for _ in range(2):
        again = bssn_fast.spectral_norms(model, names=["experts.weight"], vectors=warm)
    torch.testing.assert_close(again["experts"].s_out, torch.ones(3, dtype=torch.float64), rtol=1e-3, atol=0)


def test_one_call_of_the_operation_whatever_the_blocks(launches):
    model = blocks(dtype=torch.float32)
    launches.clear()
    model(inputs(dtype=torch.float32)).sum().backward()
    assert launches == [(9, 1)]  # matrices, power iterations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model = blocks(dtype=dtype)
    exact = plain_copy(model).double()
    x = inputs(dtype=dtype)
    model.train(), exact.train()
    found, expected = model.qkv.weight, exact.qkv.weight
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert model(x).dtype == dtype
    assert all(v.dtype == torch.float32 for v in vectors_of(model).values())


def test_weights_in_another_memory_format():
    """The output is the innermost dimension, so that blocks are no stretches of memory."""
    model = blocks()
    for layer in (model.qkv, model.conv, model.experts):
        weight = original(layer)
        weight.data = weight.data.movedim(0, -1).contiguous().movedim(-1, 0)
    model, twin = trained(model)
    assert not original(model.qkv).is_contiguous()
    assert_same_gradients(model, twin, 1e-10)
    assert original(model.qkv).grad.stride() == original(model.qkv).stride()


def test_laws_of_blocks():
    """A bound for each block: slack, and tight."""
    numbers = {"qkv": [1e-3, 1e3, 0.5], "experts.weight": 0.25}
    model, twin = trained(blocks("bsn", at_most=numbers))
    assert_same_gradients(model, twin, 1e-10)
    torch.testing.assert_close(model.qkv.weight[3:6], original(model.qkv)[3:6], rtol=0, atol=0)
    for _ in range(300):
        model(inputs())
    norm = torch.linalg.matrix_norm
    assert norm(model.eval().qkv.weight.view(3, 3, 5), 2).tolist()[::2] == pytest.approx([1e-3, 0.5], rel=1e-3)
    assert norm(model.experts.weight, 2).tolist() == pytest.approx([0.25] * 3, rel=1e-3)
    shown = bssn_fast.summary(model).splitlines()
    assert [line.split()[:1] for line in shown[3:6]] == [["qkv[0]"], ["qkv[1]"], ["qkv[2]"]]
    assert [line.split()[2:6] for line in shown[3:5]] == [["3x5", "bsn", "at", "most"]] * 2
    assert "at most 1000 " in shown[4]
    assert "blocks=3, at_most=[0.001, 1000, 0.5]" in repr(model)


def test_scales_of_blocks():
    model, twin = trained(blocks("bssn", scale={"qkv": (0.5, 1.0, 2.0)}))
    assert_same_gradients(model, twin, 1e-10)
    measured = bssn_fast.diagnostics.measure(model)
    for j, scale in enumerate((0.5, 1.0, 2.0)):
        own = measured[f"qkv[{j}]"]
        block = original(model.qkv).detach()[3 * j : 3 * j + 3]
        assert own.variance == pytest.approx(float(block.var(correction=0)) * (scale / own.sigma) ** 2)
        assert own.gradient == pytest.approx(float(original(model.qkv).grad[3 * j : 3 * j + 3].norm()))


def test_a_gain_for_each_block():
    model = Blocks().double()
    x = inputs()
    before = model(x)
    bssn_fast.apply(model, "bsn", blocks=BLOCKS, gain="learn")
    torch.testing.assert_close(model.eval()(x), before)
    gain = norm_of(model.experts).gain
    assert gain.shape == (3,)
    model.train()(x).square().sum().backward()
    sigma, weight = bssn_fast.sigma(model)["experts"], original(model.experts)
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        gain *= torch.tensor([1.0, 2.0, 0.5])
    torch.testing.assert_close(model.eval().experts.weight, weight * (gain / sigma).view(3, 1, 1))

    def loss(values):
        name = "experts.parametrizations.weight.0.gain"
        return torch.func.functional_call(model, {name: values}, (x,)).square().sum()

    found = torch.autograd.grad(loss(gain), gain)[0]
    steps = torch.eye(3, dtype=torch.float64) * 1e-6
    expected = [(loss(gain.detach() + step) - loss(gain.detach() - step)) / 2e-6 for step in steps]
    torch.testing.assert_close(found, torch.stack(expected).detach(), rtol=1e-5, atol=1e-8)


def test_gradients_of_gradients():
    model = bssn_fast.apply(Experts().double(), "sn", blocks={"weight": 3}, gain="learn").eval()
    x = torch.randn(2, 4, dtype=torch.float64)
    tensors = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}

    def call(*values):
        return torch.func.functional_call(model, dict(zip(tensors, values, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(call, tuple(tensors.values()))


def test_complex_blocks_and_blocks_of_one_dimension():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
            self.b = nn.Parameter(torch.randn(6, dtype=torch.float64))

        def forward(self):
            return self.a.abs().sum() + self.b.sum()

    model = bssn_fast.apply(Odd(), "sn", blocks={"a": 2, "b": 3})
    for _ in range(100):
        model()
    found = bssn_fast.sigma(model)
    a, b = (model.parametrizations[name].original.detach() for name in "ab")
    torch.testing.assert_close(found["a"], torch.linalg.matrix_norm(a.view(2, 2, 3), 2))
    torch.testing.assert_close(found["b"], torch.linalg.vector_norm(b.view(3, 2), dim=1))
    model().backward()
    torch.testing.assert_close(model.b, (b.view(3, 2) / found["b"].view(3, 1)).flatten())


def test_which_weights_are_taken():
    attention = nn.MultiheadAttention(8, 2)
    bssn_fast.apply(attention, "sn", blocks={"in_proj_weight": 3})
    assert set(bssn_fast.sigma(attention)) == {"in_proj_weight", "out_proj"}
    attention = bssn_fast.apply(
        nn.MultiheadAttention(8, 2), "sn", names=["in_proj_weight"], blocks={"in_proj_weight": 6}
    )
    assert list(bssn_fast.sigma(attention)) == ["in_proj_weight"]
    assert bssn_fast.sigma(attention)["in_proj_weight"].shape == (6,)
    bssn_fast.apply(attention, "bssn", names=["in_proj_weight"])  # blocks stay
    assert bssn_fast.sigma(attention)["in_proj_weight"].shape == (6,)
    model = bssn_fast.apply(Blocks(), "sn", filter_fn=lambda name, _: name == "head", blocks={"qkv": 3})
    assert set(bssn_fast.sigma(model)) == {"head", "qkv"}
    bssn_fast.apply(model, "sn", only="normalized", blocks={"qkv": 3})
    one = bssn_fast.apply(nn.Linear(3, 4), "sn", blocks={"": 1})
    assert bssn_fast.sigma(one)[""].ndim == 0


BAD = [
    (lambda: Net(), {"blocks": {"head": 2}}, "head: a weight of shape .1, 64. cannot be divided into 2 blocks"),
    (lambda: Net(), {"blocks": {"body.3": 2}}, "body.3: blocks are parts of the first dimension, and its output is"),
    (
        lambda: Blocks(),
        {"blocks": {"experts.weight": 2}},
        "experts: .* into 2 blocks; give as many as its first dimension, 3",
    ),
    (lambda: Net(), {"blocks": {"head": 1, "head.weight": 1}}, "blocks names head twice, as 'head' and 'head.weight'"),
    (
        lambda: nn.Linear(4, 3),
        {"blocks": {"": 2}},
        "Linear: a weight of shape .3, 4. cannot be divided into 2 blocks; give",
    ),
    (lambda: Net(), {"blocks": {"nothing": 2}}, "no module or parameter named 'nothing'"),
    (lambda: Net(), {"blocks": {"first": 0}}, r"blocks\['first'\] must be a whole number of at least 1, not 0"),
    (lambda: Net(), {"blocks": {"first": 2.0}}, "must be a whole number"),
    (lambda: Net(), {"blocks": {3: 2}}, "blocks must be numbers by names"),
    (lambda: Net(), {"blocks": 2}, "blocks must be numbers by names"),
    (
        lambda: Net(),
        {"blocks": {"first": 2}, "names": ["head"]},
        "blocks names 'first', which is not one of the layers",
    ),
    (lambda: Net(), {"blocks": {"first": 2}, "sharded": "reduce"}, "sharded='auto' or 'gather'"),
    (
        lambda: Net(),
        {"blocks": {"first": 2}, "scale": {"first": [1.0, 2.0, 3.0]}},
        r"scale\['first'\] has 3 numbers, and",
    ),
    (lambda: Net(), {"scale": {"first": [1.0, 2.0]}}, r"scale\['first'\] has 2 numbers, and the weight one block"),
    (
        lambda: Net(),
        {"blocks": {"first": 2}, "scale": {"first": [1.0, -2.0]}},
        "must be a positive finite number, not -2.0",
    ),
    (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4))),
        {"blocks": {"0": 2}},
        "0: the weight is normalised as one block already; take its spectral norm off first",
    ),
    (
        lambda: bssn_fast.apply(nn.Sequential(nn.Linear(4, 4)), blocks={"0": 2}),
        {"blocks": {"0": 4}},
        "0: the weight is normalised as 2 blocks already; call bssn_fast.remove, and apply again",
    ),
]


@pytest.mark.parametrize(("make", "settings", "message"), BAD, ids=[str(settings) for _, settings, _ in BAD])
def test_refused_before_anything_changes(make, settings, message):
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=message):
        bssn_fast.apply(model, "bssn", **settings)
    assert same(before, model.state_dict())


def test_layers_that_share_a_weight_have_the_same_blocks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="1 shares its weight with 0, which was given other blocks"):
        bssn_fast.apply(model, "sn", blocks={"0": 2})
    bssn_fast.apply(model, "sn", blocks={"0": 2, "1": 2})
    assert norm_of(model[0]) is norm_of(model[1])


def test_a_mixture_with_layers_without_blocks_keeps_their_numbers():
    """Bit for bit, whatever shares the call."""
    torch.manual_seed(0)
    first = Net()
    second = copy.deepcopy(first)
    bssn_fast.apply(first), bssn_fast.apply(second, blocks={"first": 4})
    x = images()
    state = {k: v for k, v in first.state_dict().items() if not k.startswith("first.")}
    second.load_state_dict(state, strict=False)
    for net in (first, second):
        net(x)
    for name in ("head", "embed", "body.1", "body.3"):
        assert torch.equal(bssn_fast.sigma(first)[name], bssn_fast.sigma(second)[name])


def test_a_weight_that_is_given_another_shape():
    """Its blocks would be others; those of experts are numbered by the first dimension."""
    model = blocks()
    model(inputs())
    vectors = vectors_of(model)
    for layer, shape in (
        (model.qkv, (8, 5)),
        (model.qkv, (12, 5)),
        (model.experts, (2, 5, 4)),
        (model.experts, (4, 5, 4)),
    ):
        before = original(layer)
        layer.parametrizations.weight.original = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        for call in (lambda: model(inputs()), lambda layer=layer: layer.weight):
            with pytest.raises(ValueError, match="does not fit its layer's vectors"):
                call()
        layer.parametrizations.weight.original = before
    assert same(vectors, vectors_of(model))


def test_matrices_of_modules_that_are_layers_too():
    """Only of a convolution's own weight are further dimensions kernel positions."""

    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.adapters = nn.Parameter(torch.randn(3, 2, 4))

    class Batched(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.weight = nn.Parameter(torch.randn(3, 2, 4))

        def forward(self, x):
            return x @ self.weight.mT

    for model, name in ((Adapted(), "adapters"), (Batched(), "weight")):
        bssn_fast.apply(model, "sn", names=[name], blocks={name: 3})
        for _ in range(200):
            model(torch.randn(2, 4))
        weight = model.parametrizations[name].original.detach()
        (found,) = bssn_fast.sigma(model).values()
        torch.testing.assert_close(found, torch.linalg.matrix_norm(weight, 2))


def test_parameters_that_were_named_before_get_the_new_settings(launches):
    model = blocks("sn")
    attention = bssn_fast.apply(nn.MultiheadAttention(8, 2), "sn", blocks={"in_proj_weight": 3})
    bssn_fast.apply(model, "ssn"), bssn_fast.apply(attention, "ssn")
    for net in (model, attention):
        assert {p.settings.variant for p in net.modules() if hasattr(p, "settings")} == {"ssn"}
    launches.clear()
    model(inputs())
    assert launches == [(9, 1)]


def test_the_other_functions_keep_blocks():
    model = blocks("bssn")
    before = norm_of(model.qkv)._u.clone()
    bssn_fast.spectral_norm(model.qkv)
    assert torch.equal(norm_of(model.qkv)._u, before)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    bssn_fast.apply(tied, "sn", names=["0"], blocks={"0": 2})
    bssn_fast.apply(tied, "bsn", names=["1"])
    assert norm_of(tied[0]) is norm_of(tied[1])
    assert bssn_fast.sigma(tied)["1"].shape == (2,)


def test_numbers_in_tensors_and_arrays():
    for numbers in (torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.5, 1.0, 2.0]).numpy()):
        model = blocks("bssn", scale={"qkv": numbers})
        assert norm_of(model.qkv).settings.scale == (0.5, 1.0, 2.0)
