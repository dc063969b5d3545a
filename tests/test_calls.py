"""When layers are normalised: once in a call of the model, whatever happens in it, and each by itself outside."""

import copy
import gc
import sys
import warnings

import pytest
import torch
from support import (
    LAYER_NAMES,
    Net,
    assert_same_gradients,
    images,
    in_use,
    norm_of,
    norms,
    original,
    plain_copy,
    same,
    vectors_of,
)
from torch import nn

import bssn_fast
from bssn_fast.modules.call import Call
from bssn_fast.modules.group import Group


def iterations(model, run):
    """How many layers were normalised with an iteration, per launch, and the names of those whose vectors changed."""
    before = {n: [b.clone() for b in p.buffers()] for n, p in norms(model).items()}
    run()
    return {n for n, p in norms(model).items() if not all(map(torch.equal, before[n], p.buffers()))}


def test_one_launch_for_each_kind(launches):
    model = bssn_fast.apply(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 1)))
    launches.clear()
    for _ in range(3):
        model(images()).sum().backward()
    assert launches == [(3, 1)] * 3
    launches.clear()
    model.half().float().to(torch.float64)
    model[1].float()
    assert norm_of(model[1])._u.dtype == torch.float32
    model[0](images(2, torch.float64))
    launches.clear()
    with pytest.raises(RuntimeError):
        model(images(2, torch.float64))
    assert sorted(launches) == [(1, 1), (2, 1)]
    assert in_use(model) == []


def test_two_hundred_layers(launches):
    layers = [m for _ in range(200) for m in (nn.Linear(5, 5), nn.LeakyReLU(0.9))]
    model = bssn_fast.apply(nn.Sequential(*layers).double(), "bsn")
    twin = plain_copy(model)
    launches.clear()
    x = torch.randn(2, 5, dtype=torch.float64)
    model(x).sum().backward(), twin(x).sum().backward()
    assert launches == [(200, 1)]
    assert_same_gradients(model, twin, 1e-9)


def test_layers_outside_a_call_of_the_model_normalise_themselves(launches):
    model = bssn_fast.apply(Net())
    launches.clear()
    changed = iterations(model, lambda: model.first(images()))
    assert launches == [(1, 1)]
    assert changed == {"first"}
    assert in_use(model) == []


def test_a_call_runs_as_long_as_its_frame():
    def frame_in_a_call():
        call = Call(sys._getframe(), 0)
        assert call.running()
        if sys.version_info >= (3, 11):
            assert not gc.get_referents(call.frame)  # the quick question has an answer in these versions
        return call

    returned = frame_in_a_call()
    assert gc.get_referents(returned.frame)
    assert not returned.running()
    returned.frame.clear()  # as unittest does with the frames of an expected exception
    assert gc.get_referents(returned.frame)
    assert not returned.running()


def test_nothing_stays_after_a_call():
    model = bssn_fast.apply(Net())
    for training in (True, False):
        model.train(training)(images())
        assert in_use(model) == []


class Failing(Net):
    error: BaseException | None = None

    def forward(self, x):
        x = super().forward(x)
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("where", ["forward", "layer", "hook_before", "hook_after"])
def test_after_an_error(error, where):
    """The next call is like any other."""
    model = bssn_fast.apply(Failing().double())

    def fail(*_):
        raise error

    handle = None
    if where == "forward":
        model.error = error()
    elif where == "layer":
        handle = model.body[0].register_forward_hook(fail)
    elif where == "hook_before":
        handle = model.register_forward_pre_hook(fail, prepend=True)
    else:
        handle = model.register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(error):
            model(images(2, torch.float64))
    model.error = None
    if handle is not None:
        handle.remove()
    twin = plain_copy(model)
    for _ in range(2):
        x = images(2, torch.float64)
        for net in (model, twin):
            net(x).sum().backward()
        assert_same_gradients(model, twin, 1e-10)
        assert in_use(model) == []
        for name, norm in norms(model).items():
            torch.testing.assert_close(tuple(norm.buffers()), norms(twin)[name].vectors)


def test_error_while_normalising(monkeypatch):
    model = bssn_fast.apply(Net())
    from bssn_fast import ops

    with monkeypatch.context() as m:
        m.setattr(ops, "normalize", lambda *args: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError):
            model(images())
    assert in_use(model) == []
    assert iterations(model, lambda: model(images()).sum().backward()) >= {"first", "body.1", "body.3"}


class Twice(Net):
    """Calls itself, and a part of itself as a model would be called."""

    def forward(self, x, deep=True):
        if deep:
            return self(x, deep=False) + self(2 * x, deep=False)
        return super().forward(x)


def test_a_model_that_calls_itself_iterates_once():
    model = bssn_fast.apply(Twice().double())
    twin = plain_copy(model)
    x = images(2, torch.float64)
    model(x).square().sum().backward()
    with nn.utils.parametrize.cached():
        out = twin(x)
    out.square().sum().backward()
    assert_same_gradients(model, twin, 1e-10)
    for name, norm in norms(model).items():
        torch.testing.assert_close(tuple(norm.buffers()), norms(twin)[name].vectors)


def test_a_failing_inner_call_does_not_end_the_outer_one(launches):
    class Careful(Net):
        def forward(self, x, fail=False):
            if fail:
                raise ValueError("refused")
            with pytest.raises(ValueError, match="refused"):
                self(x, fail=True)
            return super().forward(x)

    model = bssn_fast.apply(Careful())
    launches.clear()
    model(images()).sum().backward()
    assert sum(n for n, _ in launches) == len(LAYER_NAMES)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = Net(), nn.Linear(1, 3)

    def forward(self, x):
        return self.head(self.inner(x) + self.inner(2 * x))


@pytest.mark.parametrize(
    "order",
    [("",), ("inner",), ("", "inner"), ("inner", ""), ("inner", "", "inner"), ("", "inner", "")],
    ids=lambda o: "-".join(n or "outer" for n in o),
)
def test_groups_of_a_model_and_of_a_part(order, launches):
    """Layers that the outer model has normalised for its call are not normalised again in the inner model's calls."""
    model = Outer().double()
    for name in order:
        bssn_fast.apply(model.get_submodule(name), "bssn" if name else "bsn")
    assert all(len(m.parametrizations.weight) == 1 for m in map(model.get_submodule, all_names(model)))
    twin = plain_copy(model)
    launches.clear()
    x = images(2, torch.float64)
    model(x).sum().backward()
    if "" in order:
        assert sum(n for n, _ in launches) == len(norms(model)) == 6
        with nn.utils.parametrize.cached():
            out = twin(x)
        out.sum().backward()
    else:
        assert sum(n for n, _ in launches) == 2 * len(norms(model)) == 10
        twin(x).sum().backward()
    assert_same_gradients(model, twin, 1e-10)
    assert in_use(model) == []


def all_names(model):
    return list(norms(model))


def test_overlapping_groups_normalise_each_layer_once(launches):
    model = Outer()
    bssn_fast.apply(model, names=["inner.first", "head"])
    bssn_fast.apply(model.inner)
    launches.clear()
    before = vectors_of(model)
    model(images()).sum().backward()
    # The inner model is called twice; its first layer is the outer model's.
    assert launches == [(2, 1), (4, 1), (4, 1)]
    assert not same(before, vectors_of(model))


def test_part_taken_out_of_a_group(launches):
    model = Outer()
    bssn_fast.apply(model)
    bssn_fast.apply(model.inner, update="access")
    launches.clear()
    model(images())
    assert launches == [(1, 1)] * 11  # the head, and the five layers of the inner model, which is called twice
    bssn_fast.remove(model.inner)
    model(images())
    assert set(norms(model)) == {"head"}


def test_training_and_evaluation_mixed(launches):
    model = bssn_fast.apply(Net().double())
    model.body.eval()
    model.embed.eval()
    twin = plain_copy(model)
    x = images(2, torch.float64)
    changed = iterations(model, lambda: model(x).sum().backward())
    twin(x).sum().backward()
    assert changed <= {"first", "head"}
    assert "first" in changed
    assert_same_gradients(model, twin, 1e-10)
    launches.clear()
    model(x)
    assert all(n == 1 for _, n in launches)  # the others' values still hold


def test_warning_if_the_model_is_never_called():
    model = bssn_fast.apply(Net())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.forward(images())
    with pytest.warns(UserWarning, match="update='access'") as caught:
        model.forward(images())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            model.forward(images())


@pytest.mark.parametrize("how", ["access", "called", "eval", "one_layer"])
def test_no_warning_where_nothing_is_wrong(how):
    model = Net() if how != "one_layer" else nn.Sequential(nn.Conv2d(3, 8, 3))
    bssn_fast.apply(model, update="access" if how == "access" else "forward")
    if how == "called":
        model(images())
    model.train(how != "eval")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            model.forward(images())


def test_other_hooks_see_the_normalised_weights(launches):
    model = bssn_fast.apply(Net())
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append(m.first.weight))
    model.first.register_forward_hook(lambda m, args, out: seen.append(m.weight))
    launches.clear()
    model(images())
    assert seen[0] is seen[1]
    assert sum(n for n, _ in launches) == len(LAYER_NAMES)


def test_assigning_a_weight_in_a_call():
    class Assigning(Net):
        def forward(self, x):
            self.first.weight = torch.zeros_like(original(self.first))
            return self.first(x) - self.first.bias[:, None, None]

    assert not bssn_fast.apply(Assigning())(images()).any()


def test_hooks_are_the_groups_only():
    model = bssn_fast.apply(Net())
    assert [type(h.__self__) for h in model._forward_pre_hooks.values()] == [Group]
    assert [type(h.__self__) for h in model._forward_hooks.values()] == [Group]


class Masking(Net):
    """Cuts off some input channels of a layer, in its own forward, as causal convolutions do."""

    def forward(self, x):
        self.cut(self.body[1])
        return super().forward(x)


def by_attribute(layer):
    layer.parametrizations.weight.original.data[:, 4:] = 0


def by_name(layer):
    dict(layer.named_parameters())["parametrizations.weight.original"].data[:, 4:] = 0


@pytest.mark.parametrize("cut", [by_attribute, by_name])
@pytest.mark.parametrize("training", [True, False])
def test_masks_that_a_models_forward_applies(cut, training):
    """Writes through `.data`, which torch counts no version of, by code that gets at the layer in the call."""
    model = bssn_fast.apply(Masking().double())
    model.cut = lambda layer: None
    model(images(2, torch.float64))
    model.cut = cut
    model.train(training)
    read = []
    model.body[1].register_forward_hook(lambda layer, *_: read.append(layer.weight))
    for _ in range(2):
        with torch.no_grad():  # as a step of an optimizer may, before the mask is applied again
            original(model.body[1]).add_(0.1)
        model(images(2, torch.float64)).sum().backward()
        assert not read[-1][:, 4:].any()
        assert read[-1][:, :4].all()
        assert not original(model.body[1]).grad[:, :4].isnan().any()


def test_a_look_in_a_call_changes_nothing():
    model = bssn_fast.apply(Masking().double())
    twin = copy.deepcopy(model)
    model.cut, twin.cut = (lambda layer: layer.parametrizations.weight.original.norm()), (lambda layer: None)
    x = images(2, torch.float64)
    assert torch.equal(model(x), twin(x))
    assert same(vectors_of(model), vectors_of(twin))


class MaskedConv(nn.Conv2d):
    def forward(self, x):
        self.weight.data[:, 1:] *= 0
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:.*read more than once")
@pytest.mark.parametrize("training", [True, False])
def test_a_mask_on_the_normalised_weight(training):
    """As with torch's hook, the layer computes with the masked weight; sigma is that of the whole one."""
    model = bssn_fast.apply(nn.Sequential(MaskedConv(3, 4, 3).double()), "sn").train(training)
    weight = original(model[0]).detach().clone()
    for _ in range(3):
        x = images(2, torch.float64)
        found = model(x)
        masked = weight / bssn_fast.sigma(model)["0"]
        masked[:, 1:] = 0
        torch.testing.assert_close(found, nn.functional.conv2d(x, masked, model[0].bias))
    assert torch.equal(original(model[0]), weight)
