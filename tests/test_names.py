"""Weights by name: of recurrent layers and attention, and of layers that share them."""

import copy

import pytest
import torch
from support import Net, norm_of, original, plain_copy
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import bssn_fast

RECURRENT = {
    "lstm": lambda: nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True),
    "lstm_projected": lambda: nn.LSTM(5, 4, proj_size=3, batch_first=True),
    "gru": lambda: nn.GRU(5, 4, batch_first=True),
    "rnn": lambda: nn.RNN(5, 4, batch_first=True, nonlinearity="relu"),
}


class Sequence(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


def matrices(inner):
    return [f"inner.{n}" for n, p in inner.named_parameters() if p.ndim > 1]


def with_plain_weights(model, make, name):
    """The same module with the normalised weights of `model` as they are now."""
    plain = make()
    values = {n: getattr(model.inner, n) for n, _ in plain.named_parameters()}
    with torch.no_grad():
        for n, p in plain.named_parameters():
            p.copy_(values[n])
    return plain


@pytest.mark.parametrize("update", ["forward", "access"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent(kind, update, launches):
    x = torch.randn(3, 6, 5)
    model = Sequence(RECURRENT[kind]())
    order = [n for n, _ in model.named_parameters()]
    names = matrices(model.inner)
    bssn_fast.apply(model, "ssn", names=names, update=update)
    assert set(bssn_fast.sigma(model)) == set(names)
    before = vectors_of_all(model)
    launches.clear()
    model(x).square().sum().backward()
    assert sum(n for n, _ in launches) == len(names)  # one iteration each
    if update == "forward":
        assert len(launches) == 1
    assert not same_all(before, vectors_of_all(model))
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        expected = with_plain_weights(model, RECURRENT[kind], kind)(x)[0]
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(copy.deepcopy(model)(x), expected)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        optimizer.step()
        torch.testing.assert_close(model(x), with_plain_weights(model, RECURRENT[kind], kind)(x)[0])
        model.double().float()
        expected = with_plain_weights(model, RECURRENT[kind], kind)(x)[0]
        torch.testing.assert_close(model(x), expected)
    bssn_fast.remove(model)
    assert [n for n, _ in model.named_parameters()] == order
    assert type(model.inner) is type(RECURRENT[kind]())
    torch.testing.assert_close(model(x), expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), expected)


def vectors_of_all(model):
    return {n: b.clone() for n, b in model.named_buffers()}


def same_all(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_recurrent_gradients():
    """Those of the same cell written out."""
    model = Sequence(nn.RNN(3, 4, batch_first=True).double())
    bssn_fast.apply(model, "sn", names=["inner.weight_hh_l0", "inner.weight_ih_l0"])
    twin = copy.deepcopy(model)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    model(x).square().sum().backward()
    inner = twin.inner
    w_ih, w_hh = inner.weight_ih_l0, inner.weight_hh_l0
    h, out = torch.zeros(2, 4, dtype=torch.float64), []
    for t in range(5):
        h = torch.tanh(x[:, t] @ w_ih.T + inner.bias_ih_l0 + h @ w_hh.T + inner.bias_hh_l0)
        out.append(h)
    torch.stack(out).square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_recurrent_weights_are_assigned_and_initialised():
    layer = bssn_fast.apply(nn.GRU(3, 4), "sn", names=["weight_hh_l0"]).eval()
    layer.weight_hh_l0 = torch.full((12, 4), 2.0)
    torch.testing.assert_close(layer.weight_hh_l0, torch.full((12, 4), 48**-0.5))
    layer.reset_parameters()
    layer(torch.randn(2, 1, 3))


def test_torchs_spectral_norm_of_recurrent_weights_is_taken_over():
    hooked = nn.utils.spectral_norm(nn.LSTM(3, 4), name="weight_hh_l0", n_power_iterations=2)
    hooked(torch.randn(2, 1, 3))
    state, u = hooked.state_dict(), hooked.weight_hh_l0_u.clone()
    layer = bssn_fast.apply(hooked, "sn", names=["weight_hh_l0"])
    (norm,) = layer.parametrizations.weight_hh_l0
    assert torch.equal(norm._u, u)
    assert norm.settings.n_power_iterations == 2
    other = bssn_fast.apply(nn.LSTM(3, 4), "sn", names=["weight_hh_l0"])
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.parametrizations.weight_hh_l0[0]._u, u)
    plain = nn.LSTM(3, 4)
    other.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(other.parametrizations.weight_hh_l0.original, plain.weight_hh_l0)


def test_cells():
    cell = bssn_fast.apply(nn.LSTMCell(3, 4), names=["weight_ih", "weight_hh"])
    h, c = cell(torch.randn(2, 3))
    (h + c).sum().backward()
    assert cell.parametrizations.weight_hh.original.grad is not None


@pytest.mark.parametrize("separate", [False, True])
def test_multihead_attention(separate):
    def make():
        return nn.MultiheadAttention(8, 2, batch_first=True, **({"kdim": 6, "vdim": 5} if separate else {}))

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make()

        def forward(self, q, k, v):
            return self.inner(q, k, v, need_weights=False)[0]

    inputs = [torch.randn(2, 4, n) for n in ((8, 6, 5) if separate else (8, 8, 8))]
    model = Attention()
    projections = ("q_proj_weight", "k_proj_weight", "v_proj_weight") if separate else ("in_proj_weight",)
    bssn_fast.apply(model, "ssn", names=[*(f"inner.{p}" for p in projections), "inner.out_proj"])
    model(*inputs).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():  # the fast path of evaluation, and the other
        plain = make().eval()
        for name in projections:
            getattr(plain, name).copy_(getattr(model.inner, name))
        plain.out_proj.weight.copy_(model.inner.out_proj.weight)
        expected = plain(*inputs, need_weights=False)[0]
        torch.testing.assert_close(model(*inputs), expected)
    torch.testing.assert_close(model(*inputs), expected)


def test_transformer_encoder():
    """Its fast path reads the weights of all its layers."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    names = [n for n, p in model.named_parameters() if p.ndim > 1]
    bssn_fast.apply(model, "ssn", names=names)
    assert len(bssn_fast.sigma(model)) == 8
    x = torch.randn(2, 5, 8)
    model(x).sum().backward()
    model.eval()
    slow = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow)
    bssn_fast.remove(model)
    torch.testing.assert_close(model(x), slow)


def test_names_of_parameters_and_what_is_said_of_others():
    model = nn.ModuleDict({"a": Net(), "lstm": nn.LSTM(3, 4)})
    bssn_fast.apply(model, names=["a.head.weight", "lstm.weight_hh_l0"])
    assert list(bssn_fast.sigma(model)) == ["a.head", "lstm.weight_hh_l0"]
    assert "lstm.weight_hh_l0" in bssn_fast.summary(model)
    for name, words in (
        ("lstm", "lstm.weight_ih_l0"), ("lstm.weight_hh", "did you mean.*weight_hh_l0"),
        ("a.head.wieght", "did you mean"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            bssn_fast.apply(model, names=[name])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.inner(self.embed(x)).tanh())


@pytest.mark.parametrize("convert", [False, True])
def test_tied_weights_are_normalised_once(convert, launches):
    model, x = Tied().double(), torch.tensor([[0, 3, 6]])
    if convert:
        parametrizations.spectral_norm(model.inner)
    parameters = {id(p) for p in model.parameters()}
    bssn_fast.apply(model)
    assert {id(p) for p in model.parameters()} == parameters
    assert norm_of(model.embed) is norm_of(model.head)
    twin = plain_copy(model)
    launches.clear()
    loss = model(x).square().sum()
    assert sum(n for n, _ in launches) == 2
    loss.backward()
    twin(x).square().sum().backward()
    torch.testing.assert_close(original(model.head).grad, original(twin.head).grad)
    other = bssn_fast.apply(Tied().double())
    other.load_state_dict(model.state_dict(), strict=True)
    model.eval(), other.eval()
    expected = model(x)
    torch.testing.assert_close(other(x), expected)
    copied = copy.deepcopy(model)
    assert norm_of(copied.embed) is norm_of(copied.head) is not norm_of(model.head)
    torch.testing.assert_close(copied(x), expected)
    model.half().double()
    assert norm_of(model.head)._u.dtype == torch.float64
    bssn_fast.remove(copied)
    assert copied.head.weight is copied.embed.weight
    torch.testing.assert_close(copied(x), expected)


def test_tied_weights_in_steps():
    model = Tied()
    bssn_fast.apply(model, "sn", names=["embed"])
    with pytest.raises(ValueError, match=r"embed.*head"):
        bssn_fast.remove(model)
    bssn_fast.apply(model, "sn", names=["head"])
    assert norm_of(model.embed) is norm_of(model.head)
    model(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"shares"):
        bssn_fast.remove(model.head)
    bssn_fast.remove(model)
    model(torch.tensor([1])).sum().backward()


def test_tied_with_another_output_dimension():
    """Two ways to unfold one weight: each layer has its own, and both cannot be made plain."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3))
    model[1].weight = model[0].weight
    bssn_fast.apply(model, "sn")
    model(torch.randn(1, 4, 5, 5)).sum().backward()
    assert norm_of(model[0]) is not norm_of(model[1])
    with pytest.raises(ValueError, match="another way"):
        bssn_fast.remove(model)
    assert parametrize.is_parametrized(model[0])
    assert parametrize.is_parametrized(model[1])


def test_own_parameters_of_a_module():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.kernel = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.randn(4, 3, 2))
            self.other = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return (self.kernel.sum(2) + self.other) @ x + self.bias

    model = bssn_fast.apply(Own(), names=["kernel", "other"])
    model(torch.randn(3)).sum().backward()
    assert set(bssn_fast.sigma(model)) == {"kernel", "other"}
    bssn_fast.remove(model)
    assert [n for n, _ in model.named_parameters()] == ["bias", "kernel", "other"]
