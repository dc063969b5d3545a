"""Weights that hold several matrices: what is kept, saved, loaded, copied, compiled and differentiated."""

import copy
import pickle

import pytest
import torch
from block_models import BLOCKS, Blocks, blocks, inputs
from compiling import as_model, as_part, fresh_compiler
from support import assert_same_gradients, norm_of, original, plain_copy, same, vectors_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import bssn_fast


@pytest.mark.parametrize("law", [{}, {"gain": "learn"}, {"at_most": {"qkv": [0.1, 0.2, 0.3]}}])
def test_copies_and_state_dicts(law):
    model = blocks("bsn", **law)
    model(inputs()).sum().backward()
    model.eval()
    x = inputs()
    expected = model(x)
    state = model.state_dict()
    assert state["experts.parametrizations.weight.0._u"].shape == (3, 5)
    assert state["conv.parametrizations.weight.0._v_in"].shape == (2, 18)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.state_dict()))):
        twin = other if isinstance(other, nn.Module) else blocks("bsn", **law).eval()
        if twin is not other:
            twin.load_state_dict(other)
        torch.testing.assert_close(twin(x), expected)
    for name, theirs in bssn_fast.sigma(copy.deepcopy(model)).items():
        torch.testing.assert_close(theirs, bssn_fast.sigma(model)[name])
    plain = bssn_fast.remove(model)
    torch.testing.assert_close(plain(x), expected)
    assert plain.experts.weight.shape == (3, 5, 4)


@pytest.mark.parametrize("law", [{}, {"gain": "learn"}])
def test_checkpoints_of_plain_models_and_averaged_vectors(law):
    saved, x = Blocks().double(), inputs()
    model = blocks("bsn", **law).eval()
    model.load_state_dict(saved.state_dict())
    if law:
        torch.testing.assert_close(model(x), saved(x))
    model(x)
    for name in ("qkv", "experts"):
        norm = torch.linalg.matrix_norm(original(model.get_submodule(name)).view(3, -1, model_width(name)), 2)
        torch.testing.assert_close(bssn_fast.sigma(model.eval())[name], norm, rtol=1e-2, atol=0)
    state = model.state_dict()
    key = "experts.parametrizations.weight.0._v"
    state[key] = state[key] * torch.tensor([1, 0.2, 1], dtype=torch.float64).view(3, 1)  # of one block
    twin = blocks("bsn", **law).eval()
    twin.load_state_dict(state)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(norm_of(twin.experts)._v.norm(dim=1), torch.ones(3, dtype=torch.float64))


def model_width(name):
    return {"qkv": 5, "experts": 4}[name]


def test_a_block_that_changes_without_its_vectors():
    """In evaluation the vectors are computed anew; those of the other blocks come out as they were."""
    model = blocks("sn")
    for _ in range(300):
        model(inputs())
    model.eval()(inputs())
    before = norm_of(model.experts)._u.clone()
    with torch.no_grad():
        original(model.experts)[1] = torch.randn(5, 4, dtype=torch.float64)
    model(inputs())
    torch.testing.assert_close(bssn_fast.sigma(model)["experts"], torch.linalg.matrix_norm(original(model.experts), 2))
    torch.testing.assert_close(norm_of(model.experts)._u[::2].abs(), before[::2].abs(), rtol=0, atol=1e-3)


def test_precision_and_device_moves():
    model = blocks(dtype=torch.float32)
    model.half()
    assert all(v.dtype == torch.float32 for v in vectors_of(model).values())
    assert norm_of(model.experts)._u.shape == (3, 5)
    model.float()(inputs(dtype=torch.float32)).sum().backward()
    on_meta = copy.deepcopy(model).to("meta")
    on_meta.to_empty(device="cpu").load_state_dict(model.state_dict())
    x = inputs(dtype=torch.float32)
    torch.testing.assert_close(on_meta.eval()(x), model.eval()(x))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("law", [{}, {"gain": "learn"}])
def test_gradient_groups(groups, law):
    torch.manual_seed(0)
    model = blocks("bsn", gradient_groups=groups, **law)
    twin = copy.deepcopy(model)
    bssn_fast.apply(twin, "bsn", gradient_groups=1, **law)
    x = inputs()
    for net in (model, twin):
        net(x).square().sum().backward()
    assert_same_gradients(model, twin, 1e-12)


def test_some_gradients_only():
    model = blocks()
    twin = plain_copy(model)
    for net in (model, twin):
        net.zero_grad()
        x = torch.ones(2, 5, dtype=torch.float64)
        net.train(), net.qkv(x).sum().backward()
    assert original(model.experts).grad is None
    torch.testing.assert_close(original(model.qkv).grad, original(twin.qkv).grad)


def test_torch_func_and_forward_mode():
    model = blocks("bsn").eval()
    x, name = inputs(), "qkv.parametrizations.weight.original"
    weight = original(model.qkv).detach()

    def loss(value):
        return torch.func.functional_call(model, {name: value}, (x,)).square().sum()

    found = torch.func.grad(loss)(weight)
    model(x).square().sum().backward()
    torch.testing.assert_close(found, original(model.qkv).grad)
    tangent = torch.randn_like(weight)
    _, derivative = torch.func.jvp(loss, (weight,), (tangent,))
    torch.testing.assert_close(derivative, (found * tangent).sum())


def test_checkpoints_cached_and_interrupted_modes():
    model = blocks()
    twin = copy.deepcopy(model)
    x = inputs().requires_grad_()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    twin(x).square().sum().backward()
    assert_same_gradients(model, twin, 1e-12)
    assert same(vectors_of(model), vectors_of(twin))
    with bssn_fast.cached(model):
        first = model.experts.weight
        assert torch.equal(model.experts.weight, first)
        before = vectors_of(model)
        model(x)
        assert same({k: before[k] for k in before if k.startswith("experts")}, _experts(vectors_of(model)))


def _experts(vectors):
    return {k: v for k, v in vectors.items() if k.startswith("experts")}


@pytest.mark.parametrize("ways", [as_model, as_part])
@pytest.mark.parametrize("law", [{}, {"gain": "learn"}])
def test_compiled(ways, law):
    with fresh_compiler():
        model = blocks("bsn", **law)
        twin = copy.deepcopy(model)
        call = ways(model)
        for _ in range(3):
            x = inputs()
            for net, run in ((model, call), (twin, twin)):
                net.zero_grad()
                run(x).square().sum().backward()
            assert_same_gradients(model, twin, 1e-12)
            assert same(vectors_of(model), vectors_of(twin))
        torch.testing.assert_close(bssn_fast.sigma(model)["experts"], bssn_fast.sigma(twin)["experts"])


def test_exported():
    model = blocks(dtype=torch.float32).eval()
    x = inputs(dtype=torch.float32)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_checkpoints_of_other_blocks_are_refused_before_anything_is_loaded(strict, assign):
    whole = bssn_fast.apply(Blocks().double(), "sn", names=["conv", "qkv", "experts.weight", "head"])
    others = bssn_fast.apply(Blocks().double(), "sn", blocks={**BLOCKS, "qkv": 9})
    for saved, model in ((whole, blocks("sn")), (blocks("sn"), whole), (others, blocks("sn"))):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"the checkpoint's vectors are those of . blocks, and the layer has"):
            model.load_state_dict(saved.state_dict(), strict=strict, assign=assign)
        changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert "qkv" not in changed
        state = {k: v for k, v in saved.state_dict().items() if "_u" not in k and "_v" not in k}
        model.load_state_dict(state)
        x = inputs()
        assert torch.equal(original(model.qkv), original(saved.qkv))
        assert model(x).isfinite().all()


def test_one_question_to_the_device_whatever_the_blocks(monkeypatch):
    """Whether vectors still belong is asked for all blocks at once."""
    asked = 0
    convert = torch.Tensor.__bool__

    def counting(self):
        nonlocal asked
        asked += 1
        return convert(self)

    counts = []
    for n in (2, 64):
        model = bssn_fast.apply(nn.Linear(6, 128), "bssn", blocks={"": n})
        for _ in range(30):
            model(torch.randn(2, 6))
        with torch.no_grad():
            original(model).add_(1e-4 * torch.randn(128, 6))
        asked = 0
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__bool__", counting)
            model.eval()(torch.randn(2, 6))
        counts.append(asked)
    assert counts[0] == counts[1] > 0
