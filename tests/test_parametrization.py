import pytest
import torch
from support import VARIANTS, Net, images, norm_of, norms, original
from torch import nn

import bssn_fast
from bssn_fast.layout import vector_sizes
from bssn_fast.reference import power_iteration

SN_KEYS = {"_u", "_v"}
BSN_KEYS = {"_u", "_v", "_u_in", "_v_in"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_buffers(variant):
    model = bssn_fast.apply(Net(), variant)
    for name, norm in norms(model).items():
        two_sided = variant in ("bsn", "bssn") and name not in ("head", "embed")
        assert set(dict(norm.named_buffers())) == (BSN_KEYS if two_sided else SN_KEYS)
        sizes = vector_sizes(original(model.get_submodule(name)).shape, norm.dim, two_sided)
        assert tuple(len(b) for b in norm.buffers()) == sizes
        for b in norm.buffers():
            assert b.norm().item() == pytest.approx(1, abs=1e-5)
    keys = set(model.state_dict())
    assert {"first.parametrizations.weight.original", "first.parametrizations.weight.0._u"} <= keys
    assert keys == {n for n, _ in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("variant", ["sn", "bssn"])
def test_first_vectors_are_random_ones_iterated_fifteen_times(variant):
    """Drawn in torch's order: u, v, and then those of the input side."""
    layer = nn.Conv2d(3, 5, 3).double()
    weight = layer.weight.detach().clone()
    state = torch.get_rng_state()
    bssn_fast.apply(layer, variant)
    torch.set_rng_state(state)
    sizes = vector_sizes(weight.shape, 0, variant == "bssn")
    vectors = tuple(nn.functional.normalize(torch.randn(n, dtype=torch.float64), dim=0) for n in sizes)
    for _ in range(15):
        vectors = power_iteration(weight, vectors, 0, 1e-12)
    torch.testing.assert_close(tuple(norm_of(layer).buffers()), vectors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model(dtype):
    model = bssn_fast.apply(Net().to(dtype))
    full = bssn_fast.apply(Net())
    assert all(v.dtype == torch.float32 for p in norms(model).values() for v in p.buffers())
    assert all(v.dtype == torch.float32 for v in bssn_fast.sigma(model).values())
    loss = model(images().to(dtype)).float().square().sum()
    loss.backward()
    for name, norm in norms(model).items():
        assert all(v.dtype == torch.float32 for v in norm.buffers())
        assert model.get_submodule(name).weight.dtype == dtype
        assert original(model.get_submodule(name)).grad.dtype == dtype
    full.load_state_dict(model.state_dict())
    full.half()
    assert all(v.dtype == torch.float32 for p in norms(full).values() for v in p.buffers())


def test_assigning_to_the_weight_sets_the_one_before_normalisation():
    layer = bssn_fast.apply(nn.Linear(3, 3), "sn").eval()
    parameter = original(layer)
    layer.weight = 4 * torch.eye(3)
    assert original(layer) is parameter
    assert torch.equal(parameter, 4 * torch.eye(3))


def test_extra_repr_tells_the_settings():
    text = repr(bssn_fast.apply(nn.Linear(3, 3), "ssn", scale=1.5, eps=1e-6, n_power_iterations=2))
    for part in ("'ssn'", "scale=1.5", "eps=1e-06", "n_power_iterations=2"):
        assert part in text
    assert "scale" not in repr(bssn_fast.apply(nn.Linear(3, 3), "sn"))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", ["reference", ""])
def test_bad_weights_leave_the_vectors_alone(bad, training, backend):
    """A step that overflowed is reverted: the next sigma is right."""
    layer = bssn_fast.apply(nn.Conv2d(3, 4, 3).double(), "bsn", backend=backend).train(training)
    x = images(1, torch.float64)
    layer(x)
    good = original(layer).detach().clone()
    vectors = {k: b.clone() for k, b in norm_of(layer).named_buffers()}
    for _ in range(3):
        with torch.no_grad():
            original(layer).fill_(bad)
        out = layer(x)
        out.sum().backward()
        sigma = bssn_fast.sigma(layer)[""]
        assert sigma == 0 if bad == 0 else sigma.isnan()
        assert torch.equal(out, layer.bias[:, None, None].expand_as(out)) if bad == 0 else out.isnan().all()
        assert all(torch.equal(b, vectors[k]) for k, b in norm_of(layer).named_buffers())
    with torch.no_grad():
        original(layer).copy_(good)
    assert layer(x).isfinite().all()
    s_out, s_in = (torch.linalg.matrix_norm(good.transpose(0, d).flatten(1), 2) for d in (0, 1))
    assert bssn_fast.sigma(layer)[""] == pytest.approx(float(s_out + s_in) / 2, rel=0.02)


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_bad_weights_from_the_beginning(bad):
    """Vectors start as random unit vectors and serve as soon as there is a weight."""
    layer = nn.Linear(6, 4)
    nn.init.constant_(layer.weight, bad)
    bssn_fast.apply(layer)
    assert all(b.norm().item() == pytest.approx(1, abs=1e-5) for b in norm_of(layer).buffers())
    with torch.no_grad():
        original(layer).copy_(torch.randn(4, 6))
    for _ in range(100):
        layer(torch.randn(1, 6))
    expected = torch.linalg.matrix_norm(original(layer).detach(), 2)
    torch.testing.assert_close(bssn_fast.sigma(layer)[""], expected)


@pytest.mark.parametrize("n", [2, 8, 300_000])
@pytest.mark.parametrize("training", [True, False])
def test_weight_of_another_shape_is_refused(n, training):
    """Its vectors would be read and written beyond their ends."""
    model = bssn_fast.apply(nn.Sequential(nn.Conv1d(4, 4, 3))).train(training)
    model[0].parametrizations.weight.original.data = torch.randn(n, 4, 3)
    with pytest.raises(ValueError, match="does not fit"):
        model(torch.randn(2, 4, 8))
    with pytest.raises(ValueError, match="does not fit"):
        _ = model[0].weight
