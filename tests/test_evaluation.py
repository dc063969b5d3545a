"""Evaluation changes nothing, is right from the beginning, computes nothing twice and is never stale."""

import copy

import pytest
import torch
from support import VARIANTS, Net, images, norm_of, norms, original, plain_copy, same, vectors_of
from torch import nn
from torch.nn import functional as F

import bssn_fast
from bssn_fast import reference


def expected(model, x):
    """What plain torch operations give for the model as it is now."""
    return plain_copy(model)(x)


def assert_fresh(model, x):
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(model, x))


@pytest.fixture
def model():
    torch.manual_seed(3)
    return bssn_fast.apply(Net()).eval()


def test_single_elements_written_through_data_are_seen_after_a_change_of_mode():
    torch.manual_seed(3)
    model, x = bssn_fast.apply(nn.Linear(64, 64)).eval(), torch.randn(2, 64)
    with torch.no_grad():
        original(model).view(-1)[[100, 2000]] = 9.0  # none of those that are looked at
    assert_fresh(model, x)
    original(model).data.clamp_(-0.2, 0.2)
    model.train().eval()
    assert_fresh(model, x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_buffer_changes(variant):
    model = bssn_fast.apply(Net(), variant).eval()
    before = copy.deepcopy(model.state_dict())
    x = images().requires_grad_()
    model(x).sum().backward()
    with torch.no_grad():
        model(x), model.first(x), model.head.weight
    with bssn_fast.cached(model):
        model(x)
    assert same(before, model.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_sigma_is_right_before_the_first_step(variant):
    """As right as 15 iterations make it, and what the vectors give exactly."""
    model = bssn_fast.apply(Net().double(), variant).eval()
    for name, norm in norms(model).items():
        weight = original(model.get_submodule(name)).detach()
        s_out = torch.linalg.matrix_norm(reference.unfold(weight, norm.dim), 2)
        s_in = torch.linalg.matrix_norm(reference.unfold(weight, 1 - norm.dim), 2) if norm.two_sided else s_out
        sigma = bssn_fast.sigma(model)[name]
        assert sigma <= (s_out + s_in) / 2 * (1 + 1e-12)
        assert sigma >= 0.97 * (s_out + s_in) / 2
        torch.testing.assert_close(sigma, reference.spectral_norm(weight, tuple(norm.buffers()), norm.dim))
    assert_fresh(model, images(2, torch.float64))


def test_nothing_is_computed_while_nothing_changes(model, launches):
    x = images()
    with torch.no_grad():
        model(x)
    assert launches == [(4, 0), (1, 0)] or launches == [(5, 0)]
    launches.clear()
    for _ in range(3):
        with torch.no_grad():
            model(x)
        model(x).sum().backward()
        with torch.inference_mode():
            model(x)
    assert launches == []
    with torch.no_grad():
        model.first(x), model.first(x), model.first.weight
    assert len(launches) <= 1  # the layer by itself


def test_nothing_is_computed_again_after_a_look_at_the_model(model, launches):
    with torch.no_grad():
        model(images())
    launches.clear()
    model.state_dict(), bssn_fast.sigma(model), bssn_fast.summary(model), repr(model)
    with torch.no_grad():
        model(images())
    assert launches == []


def in_place(model, weight):
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))


def optimizer_step(model, weight):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model(images(2, weight.dtype)).square().sum().backward()
    optimizer.step()


def fused_step(model, weight):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, foreach=True)
    model(images(2, weight.dtype)).square().sum().backward()
    optimizer.step()


def data_assigned(model, weight):
    weight.data = torch.randn_like(weight)


def data_copied(model, weight):
    weight.data.copy_(torch.randn_like(weight))


def moving_average(model, weight):
    for p in model.parameters():
        p.data.mul_(0.9).add_(torch.randn_like(p), alpha=0.1)


def moving_average_of_buffers(model, weight):
    other = bssn_fast.apply(Net().double())
    for b, new in zip(model.buffers(), other.buffers(), strict=True):
        b.data.copy_(new.data)


def buffers_in_place(model, weight):
    for b in model.buffers():
        b.copy_(F.normalize(torch.randn_like(b), dim=0))


def loaded(model, weight):
    model.load_state_dict(bssn_fast.apply(Net().double()).state_dict())


def loaded_by_assignment(model, weight):
    model.load_state_dict(bssn_fast.apply(Net().double()).state_dict(), assign=True)


def channels_last(model, weight):
    in_place(model, weight)
    model.to(memory_format=torch.channels_last)


def channels_last_and_back(model, weight):
    channels_last(model, weight)
    model(images(2, weight.dtype))
    in_place(model, weight)
    model.to(memory_format=torch.contiguous_format)


def set_by_the_layer(model, weight):
    model.first.weight = torch.randn_like(weight)


def trained(model, weight):
    model.train()
    model(images(2, weight.dtype))
    model.eval()


def layer_trained_alone(model, weight):
    model.first.train()
    model.first(images(2, weight.dtype))
    model.first.eval()


def numpy_view(model, weight):
    weight.detach().numpy()[:] = torch.randn_like(weight).numpy()


def scale_changed(model, weight):
    bssn_fast.apply(model, "bssn", scale=0.5)


def variant_changed(model, weight):
    bssn_fast.apply(model, "sn")


CHANGES = (
    in_place, optimizer_step, fused_step, data_assigned, data_copied, moving_average, moving_average_of_buffers,
    buffers_in_place, loaded, loaded_by_assignment, channels_last, channels_last_and_back, set_by_the_layer, trained,
    layer_trained_alone, numpy_view, scale_changed, variant_changed,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_nothing_is_stale_after(model, change):
    model.double()
    x = images(2, torch.float64)
    with torch.no_grad():
        before = model(x)
        model.first(x)
    change(model, original(model.first))
    model.eval()
    assert not torch.allclose(model(x), before)
    assert_fresh(model, x)
    with torch.no_grad():  # the layer by itself, too
        torch.testing.assert_close(model.first(x), plain_copy(model).first(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtype_and_back(model, dtype):
    x = images()
    with torch.no_grad():
        before = model(x)
        vectors = vectors_of(model)
        out = model.to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        for name, norm in norms(model).items():
            assert all(v.dtype == (dtype if dtype == torch.float64 else torch.float32) for v in norm.buffers())
            assert model.get_submodule(name).weight.dtype == dtype
        torch.testing.assert_close(out.float(), before, rtol=0, atol=0.05 * float(before.abs().max()))
        torch.testing.assert_close(model.float()(x), before, rtol=0, atol=0.05 * float(before.abs().max()))
        assert_fresh(model, x)
    found = vectors_of(model)
    assert all(v.dtype == torch.float32 and torch.equal(v, vectors[k]) for k, v in found.items())


def test_functional_call(model):
    x = images()
    other = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    with torch.no_grad():
        before = model(x)
    for parameters in (other, {n: 2 * p for n, p in other.items()}, other):
        copied = copy.deepcopy(model)
        copied.load_state_dict({**parameters, **dict(model.named_buffers())})
        found = torch.func.functional_call(model, parameters, (x,))
        torch.testing.assert_close(found, expected(copied, x), rtol=2e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_inference_mode_and_gradients_afterwards(model):
    x = images().requires_grad_()
    with torch.inference_mode():
        before = model(x)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    weights = [original(m) for m in (model.first, model.head)]
    grads = torch.autograd.grad(model(x).square().sum(), weights, create_graph=True)
    sum(g.square().sum() for g in grads).backward()
    torch.testing.assert_close(model(x), before.clone())


def test_training_under_inference_mode_iterates(model):
    vectors = vectors_of(model)
    model.train()
    with torch.inference_mode():
        model(images())
    assert not same(vectors, vectors_of(model))
    model(images()).sum().backward()


def test_model_made_in_inference_mode():
    with torch.inference_mode():
        model = bssn_fast.apply(Net()).eval()
        before = model(images())
        original(model.first).add_(1)
        assert not torch.equal(model(images()), before)


def test_writing_into_a_result_of_a_call_harms_no_later_one():
    class Writing(Net):
        writes = False

        def forward(self, x):
            out = super().forward(x)
            if self.writes:
                self.first.weight.zero_()
            return out

    model, x = bssn_fast.apply(Writing()).eval(), images()
    with torch.no_grad():
        before = model(x)
        model.writes = True
        for _ in range(2):
            assert torch.equal(model(x), before)


def test_right_after_vectors_moved_to_where_the_weight_is_not(model):
    """Buffers of another dtype, as `load_state_dict(assign=True)` of a converted checkpoint leaves them."""
    state = {k: v.double() if k.endswith(("_u", "_v", "_in")) else v for k, v in model.state_dict().items()}
    x = images()
    before = model(x)
    model.load_state_dict(state, assign=True)
    torch.testing.assert_close(model(x), before)
    assert norm_of(model.first)._u.dtype == torch.float32


@pytest.mark.parametrize("moved", [lambda v: v.double(), lambda v: v.to("meta")], ids=["dtype", "device"])
def test_vectors_moved_in_inference_mode_are_tensors_as_before(model, moved):
    """They are written to afterwards, by training and by `load_state_dict`."""
    saved = copy.deepcopy(model.state_dict())
    for norm in norms(model).values():
        for name in norm.vector_names:
            setattr(norm, name, moved(getattr(norm, name)))
    with torch.inference_mode():
        model(images())
    assert not any(v.is_inference() for v in model.buffers())
    model.train()(images()).sum().backward()
    model.load_state_dict(saved)
    assert same(saved, model.state_dict())


def test_evaluating_a_weight_that_shares_memory_reads_nothing_else():
    layer = bssn_fast.apply(nn.Linear(64, 64, bias=False), "sn").eval()
    _ = layer.weight
    layer.parametrizations.weight.original.data = torch.full((1,), 2.0).expand(64, 64)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer.weight, torch.full((64, 64), 1 / 64), rtol=1e-4, atol=0)


def test_sigma_is_that_of_the_last_call_where_nothing_is_computed(model):
    """Others, of a layer alone or under autocast, came between."""
    x = images()
    with torch.no_grad():
        model(x)
        before = bssn_fast.sigma(model)
        weight = original(model.first)
        other = {"parametrizations.weight.original": torch.randn_like(weight)}
        torch.func.functional_call(model.first, other, (x,))
        model(x)
        assert same(bssn_fast.sigma(model), before)
        weight.mul_(2)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        assert bssn_fast.sigma(model)["first"] == 2 * before["first"]
        weight.div_(2)
        model(x)
    assert same(bssn_fast.sigma(model), before)


def test_sigma_is_a_copy():
    layer = bssn_fast.apply(nn.Linear(5, 4)).eval()
    before = bssn_fast.sigma(layer)[""]
    bssn_fast.sigma(layer)[""].mul_(2)
    assert bssn_fast.sigma(layer)[""] == before
