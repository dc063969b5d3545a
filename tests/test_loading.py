"""Checkpoints of other layouts load into normalised layers, and what they do not have is estimated."""

import copy

import pytest
import torch
from support import LAYERS, VARIANTS, Net, images, layer_and_input, norm_of, norms, original, same, vectors_of
from test_convert import KINDS
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.utils import parametrizations, prune, spectral_norm

import bssn_fast
from bssn_fast import reference


def exact_sigma(layer):
    norm, weight = norm_of(layer), original(layer).detach().double()
    sides = (norm.dim, 1 - norm.dim) if norm.two_sided else (norm.dim,)
    return sum(float(torch.linalg.matrix_norm(reference.unfold(weight, d), 2)) for d in sides) / len(sides)


def assert_sigma_right(model, rel=0.01):
    found = bssn_fast.sigma(model)
    for name in norms(model):
        assert float(found[name]) == pytest.approx(exact_sigma(model.get_submodule(name)), rel=rel), name


def unlike_before(layer):
    """A weight whose largest singular value belongs to a direction of its own."""
    weight = torch.randn_like(layer.weight)
    weight[-1] += 5 * torch.randn(weight[-1].shape)
    return 3 * weight


def torchs_net(kind):
    """A trained net whose layers, but one, carry a spectral norm of torch."""
    theirs = Net()
    for layer in (theirs.first, theirs.body[1], theirs.body[3], theirs.head):
        KINDS[kind](layer)
    for _ in range(3):
        theirs(images())
    return theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_vectors_of_torchs_checkpoints_are_kept(name, kind):
    layer, x = layer_and_input(name)
    theirs = KINDS[kind](copy.deepcopy(layer))
    theirs(x), theirs(x)
    ours = bssn_fast.apply(layer, "sn")
    saved = theirs.state_dict()
    before = {k: v.clone() for k, v in saved.items()}
    ours.load_state_dict(saved, strict=True)
    assert same(before, dict(saved))  # the caller's dict stays as it is
    u, v = (theirs.weight_u, theirs.weight_v) if kind == "hook" else norm_of(theirs).buffers()
    assert torch.equal(norm_of(ours)._u, u)
    assert torch.equal(norm_of(ours)._v, v)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("assign", [False, True])
def test_sigma_is_right_after_loading(kind, variant, assign):
    theirs = Net() if kind == "plain" else torchs_net(kind)
    if kind == "plain":
        for name in ("first", "body.1", "body.3", "head", "embed"):
            layer = theirs.get_submodule(name)
            layer.weight.data = unlike_before(layer)
    model = bssn_fast.apply(Net(), variant)
    random_state = torch.get_rng_state()
    model.load_state_dict(theirs.state_dict(), strict=True, assign=assign)
    assert torch.equal(random_state, torch.get_rng_state())
    twin = copy.deepcopy(model).eval()
    twin(images())
    model(images())
    if kind == "plain":
        assert_sigma_right(twin)
        assert_sigma_right(model)
    else:  # what torch estimated is not touched, and the input sides are new
        for name, norm in norms(twin).items():
            if not norm.two_sided:
                continue
            matrix = reference.unfold(original(twin.get_submodule(name)).detach(), 1 - norm.dim)
            exact = float(torch.linalg.matrix_norm(matrix, 2))
            assert float(norm._u_in @ matrix @ norm._v_in) == pytest.approx(exact, rel=0.01)


def test_checkpoints_of_other_variants():
    one = bssn_fast.apply(Net(), "sn")
    for _ in range(30):
        one(images())
    both = bssn_fast.apply(Net(), "bssn")
    both.load_state_dict(one.state_dict(), strict=True)
    assert all(torch.equal(v, vectors_of(both)[k]) for k, v in vectors_of(one).items())
    both.eval()(images())
    assert_sigma_right(both, rel=0.02)

    one = bssn_fast.apply(Net(), "sn")
    found = one.load_state_dict(both.state_dict(), strict=True)
    assert found == ([], [])
    assert all(torch.equal(v, vectors_of(both)[k]) for k, v in vectors_of(one).items())
    one.eval()(images())
    assert_sigma_right(one, rel=0.02)


def test_saved_in_torchs_layout():
    ours, theirs = bssn_fast.apply(Net(), "sn"), Net()
    for layer in (theirs.first, theirs.body[1], theirs.body[3], theirs.head, theirs.embed):
        KINDS["parametrization"](layer)
    ours.load_state_dict(Net().state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_first_version_of_the_hook():
    """It saved the normalised weight, and no v."""
    state = nn.utils.spectral_norm(nn.Linear(6, 4)).state_dict()
    state["weight"] = state["weight_orig"] / 2
    del state["weight_v"], state._metadata
    layer = bssn_fast.apply(nn.Linear(6, 4), "sn")
    layer.load_state_dict(state, strict=True)
    assert torch.equal(original(layer), state["weight_orig"])
    layer.eval()(torch.randn(2, 6))
    assert_sigma_right(layer)


@pytest.mark.parametrize("length", [0.0, 0.97, 1.5, float("nan")])
def test_vectors_that_are_no_unit_vectors(length):
    """Someone averaged them."""
    state = bssn_fast.apply(Net()).state_dict()
    for key in state:
        if key.endswith(("_u", "_v", "_in")):
            state[key] = length * state[key]
    model = bssn_fast.apply(Net())
    model.load_state_dict(state)
    model.eval()(images())
    assert_sigma_right(model)


def test_half_precision_checkpoint_keeps_its_vectors():
    theirs = parametrizations.spectral_norm(nn.Linear(300, 200))
    theirs = theirs.bfloat16()
    ours = bssn_fast.apply(nn.Linear(300, 200), "sn")
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(norm_of(ours)._u, norm_of(theirs)._u.float(), rtol=4e-3, atol=0)
    assert float(norm_of(ours)._u.norm()) == pytest.approx(1, abs=1e-6)


def test_what_does_not_match_is_said_as_torch_says_it():
    model = bssn_fast.apply(Net())
    before = copy.deepcopy(model.state_dict())
    state = Net().state_dict()
    del state["first.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*first.parametrizations.weight.original"):
        model.load_state_dict(state)
    state = Net().state_dict()
    state["first.weight"] = torch.zeros(8, 3, 2, 2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state)
    state = Net().state_dict() | {"extra": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        model.load_state_dict(state)
    model.load_state_dict(before)
    missing, unexpected = model.load_state_dict({"first.weight": torch.zeros(8, 3, 3, 3), "extra": 1}, strict=False)
    assert "extra" in unexpected
    assert "first.parametrizations.weight.original" not in missing
    assert not original(model.first).any()
    assert all(torch.isfinite(v).all() for v in norm_of(model.first).buffers())


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("shape", [(8, 3, 5, 5), (8, 27)])
@pytest.mark.parametrize("variant", ["sn", "bssn"])
def test_vectors_of_a_weight_that_does_not_fit(variant, shape, filtered):
    """What fits of a checkpoint is loaded, by torch even where it raises: vectors alone belong to no weight here."""
    theirs = bssn_fast.apply(nn.Sequential(nn.Conv2d(3, 8, 5) if shape[1] == 3 else nn.Linear(27, 8)), variant)
    model = bssn_fast.apply(nn.Sequential(nn.Conv2d(3, 8, 3)), variant)
    before, state = vectors_of(model), theirs.state_dict()
    mine = model.state_dict()
    fitting = [k for k, v in state.items() if k in mine and v.shape == mine[k].shape]
    assert "0.parametrizations.weight.0._u" in fitting
    if filtered:
        model.load_state_dict({k: state[k] for k in fitting}, strict=False)
    else:
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict(state, strict=False)
    assert same(before, vectors_of(model))
    assert_sigma_right(model.eval(), rel=0.1)
    assert torch.linalg.matrix_norm(model[0].weight.flatten(1), 2) < 1.6


def test_vectors_alone_of_the_weight_that_is_there():
    """Parameters and buffers may come one after the other."""
    theirs = bssn_fast.apply(Net())
    for _ in range(20):
        theirs(images())
    model, state = bssn_fast.apply(Net()), theirs.state_dict()
    parameters = {k: v for k, v in state.items() if not k.rpartition(".")[2].startswith("_")}
    model.load_state_dict(parameters, strict=False)
    model.load_state_dict({k: v for k, v in state.items() if k not in parameters}, strict=False)
    assert same(vectors_of(model), vectors_of(theirs))


def test_a_zero_weight_and_no_vectors():
    model = bssn_fast.apply(nn.Linear(3, 4))
    model.load_state_dict({"weight": torch.zeros(4, 3), "bias": torch.zeros(4)})
    assert not model(torch.ones(1, 3)).any()
    with torch.no_grad():
        original(model).copy_(torch.eye(4, 3))
    for _ in range(2):
        model(torch.ones(1, 3))
    assert bssn_fast.sigma(model)[""] == pytest.approx(1)


def test_no_hook_is_left():
    layer = nn.Linear(3, 3)
    for _ in range(2):
        bssn_fast.apply(layer)
        bssn_fast.apply(layer, "sn")
        assert len(layer._load_state_dict_pre_hooks) == 1
        bssn_fast.remove(layer)
    assert not layer._load_state_dict_pre_hooks
    layer.load_state_dict(nn.Linear(3, 3).state_dict(), strict=True)


def test_loads_what_torchs_removal_would_keep_from_loading():
    layer = nn.utils.remove_spectral_norm(nn.utils.spectral_norm(nn.Linear(3, 3)))
    bssn_fast.apply(layer)
    layer.load_state_dict(layer.state_dict(), strict=True)
    layer.load_state_dict(nn.Linear(3, 3).state_dict(), strict=True)
    layer.load_state_dict(nn.utils.spectral_norm(nn.Linear(3, 3)).state_dict(), strict=True)


def test_copies_load_for_themselves():
    model = bssn_fast.apply(Net())
    twin = copy.deepcopy(model)
    state = Net().state_dict()
    twin.load_state_dict(state)
    assert torch.equal(original(twin.first), state["first.weight"])
    assert not torch.equal(original(model.first), state["first.weight"])


@pytest.mark.parametrize("kind", ["ours", "parametrization", "hook"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_normalised_checkpoint_in_a_plain_model(kind, strict):
    """torch alone says which keys are missing or, with `strict=False`, nothing; the weight is not loaded."""
    layer = nn.Linear(3, 3)
    normalise = {"ours": bssn_fast.apply, "parametrization": parametrizations.spectral_norm, "hook": spectral_norm}
    state = nn.ModuleDict({"a": normalise[kind](layer), "b": nn.Linear(3, 3)}).state_dict()
    plain = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"^a\.weight is normalised in the checkpoint.*bssn_fast\.apply"):
        bssn_fast.load_state_dict(plain, state, strict=strict)
    assert same(plain.state_dict(), before)
    bssn_fast.load_state_dict(bssn_fast.apply(plain, "sn", names=["a"]), state, strict=strict)
    assert torch.equal(
        original(plain["a"]), state.get("a.parametrizations.weight.original", state.get("a.weight_orig"))
    )


@pytest.mark.parametrize("variant", ["sn", "bsn"])
def test_a_first_gain_of_vectors_that_are_far_off(variant):
    """Those of torch's hook are random before its first call; the weight stays the one in use there."""
    theirs = spectral_norm(nn.Conv2d(6, 8, 3).double()).eval()
    ours = bssn_fast.apply(nn.Conv2d(6, 8, 3).double(), variant, gain="learn").eval()
    ours.load_state_dict(theirs.state_dict())
    theirs(torch.zeros(1, 6, 3, 3, dtype=torch.float64))
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("kind", ["plain", "hook"])
def test_a_weight_in_two_layouts_is_not_lost(kind):
    """torch's set_model_state_dict adds what the model has; with `strict=False` the checkpoint's would be left out."""
    model, other = bssn_fast.apply(nn.Sequential(nn.Linear(3, 3))), nn.Sequential(nn.Linear(3, 3))
    state = (nn.Sequential(spectral_norm(other[0])) if kind == "hook" else other).state_dict()
    before = copy.deepcopy(model.state_dict())
    options = StateDictOptions(full_state_dict=True, strict=False)
    with pytest.raises(RuntimeError, match=r"original and 0\.weight\S* are both.*before fully_shard"):
        set_model_state_dict(model, dict(state), options=options)
    assert same(model.state_dict(), before)
    model.load_state_dict(state)
    assert not torch.equal(original(model[0]), before["0.parametrizations.weight.original"])


@pytest.mark.parametrize("kind", ["plain", "normalised"])
def test_a_checkpoint_without_values(kind):
    with torch.device("meta"):
        other, model = nn.Linear(3, 3), bssn_fast.apply(nn.Linear(3, 3), "bssn")
    gained = bssn_fast.apply(nn.Linear(3, 3), "sn", gain="learn")
    state = (bssn_fast.apply(other, "sn") if kind == "normalised" else other).state_dict()
    for net in (model, gained):
        net.load_state_dict(state.copy(), assign=True)
        assert all(x.is_meta for x in net.state_dict().values())


def test_a_pruned_checkpoint_is_not_taken_for_a_normalised_one():
    pruned = nn.Sequential(nn.Linear(3, 3))
    prune.l1_unstructured(pruned[0], "weight", 0.3)
    with pytest.raises(RuntimeError, match="Missing key"):
        bssn_fast.load_state_dict(nn.Sequential(nn.Linear(3, 3)), pruned.state_dict())


def test_no_state_dict():
    with pytest.raises(TypeError, match="needs a state_dict, not str"):
        bssn_fast.load_state_dict(nn.Linear(2, 2), "checkpoint.pt")


def test_tied_weights_stay_tied():
    """torch's `assign=True` gives each layer a Parameter of its own, for which the same u and v cannot do."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    bssn_fast.apply(model)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"0\.weight is shared.*assign=False"):
        model.load_state_dict(state, assign=True)
    model.load_state_dict(state)
    assert original(model[0]) is original(model[1])
    bssn_fast.remove(model).load_state_dict(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict(), assign=True)
    bssn_fast.apply(model)(torch.randn(1, 4))
    assert norm_of(model[0]) is not norm_of(model[1])
    assert_sigma_right(model)
