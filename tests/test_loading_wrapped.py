"""Checkpoints of wrapped models, and checkpoints that load into them: the prefixes need not be the same."""

import pytest
import torch
from support import Net, norms, original, same
from torch import nn

import bssn_fast


def prefixed(state, prefix):
    found = type(state)((prefix + k, v) for k, v in state.items())
    found._metadata = {(prefix + k).rstrip("."): v for k, v in state._metadata.items()}
    return found


PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.")


class WithBatchNorm(Net):
    """Its module version decides whether `num_batches_tracked` may be missing."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["plain", "ours"])
def test_prefixes(prefix, kind):
    theirs = WithBatchNorm() if kind == "plain" else bssn_fast.apply(WithBatchNorm())
    model = bssn_fast.apply(WithBatchNorm())
    found = bssn_fast.load_state_dict(model, prefixed(theirs.state_dict(), prefix))
    assert found == ([], [])
    for name in norms(model):
        layer = theirs.get_submodule(name)
        assert torch.equal(original(model.get_submodule(name)), layer.weight if kind == "plain" else original(layer))
    assert torch.equal(model.first.bias, theirs.first.bias)


class Wrapping(nn.Module):
    """A model with a part that has a wrapper's name."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(3, 3)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_part_named_as_a_wrapper(prefix):
    theirs, model = Wrapping(), bssn_fast.apply(Wrapping())
    bssn_fast.load_state_dict(model, prefixed(theirs.state_dict(), prefix))
    assert torch.equal(original(model.module), theirs.module.weight)


def test_a_parameter_named_as_a_wrapper():
    model = nn.ParameterDict({"module": torch.zeros(2)})
    bssn_fast.load_state_dict(model, {"module": torch.ones(2)})
    assert model["module"].sum() == 2


def test_into_wrapped_models():
    theirs = Net()
    for wrapped in (
        nn.DataParallel(bssn_fast.apply(Net())),
        torch.compile(bssn_fast.apply(Net())),
        torch.compile(nn.DataParallel(bssn_fast.apply(Net()))),
    ):
        bssn_fast.load_state_dict(wrapped, theirs.state_dict())
        assert torch.equal(wrapped.state_dict()[next(iter(wrapped.state_dict()))], theirs.first.bias)
    averaged = torch.optim.swa_utils.AveragedModel(bssn_fast.apply(Net()))
    averaged.update_parameters(bssn_fast.apply(Net()))
    other = torch.optim.swa_utils.AveragedModel(bssn_fast.apply(Net()))
    bssn_fast.load_state_dict(other, averaged.state_dict())
    assert same(other.state_dict(), averaged.state_dict())
    model = bssn_fast.apply(Net())
    bssn_fast.load_state_dict(model, averaged.state_dict())
    assert same(model.state_dict(), averaged.module.state_dict())


def test_compiled_parts_and_errors():
    theirs = Net()
    theirs.body = torch.compile(theirs.body)
    model = bssn_fast.apply(Net())
    bssn_fast.load_state_dict(model, theirs.state_dict())
    assert torch.equal(original(model.body[1]), theirs.state_dict()["body._orig_mod.1.weight"])
    with pytest.raises(RuntimeError, match="Missing"):
        bssn_fast.load_state_dict(model, {"module.head.bias": torch.zeros(1)})
    found = bssn_fast.load_state_dict(model, {"module.head.bias": torch.zeros(1), "module.x": 1}, strict=False)
    assert found.unexpected_keys == ["x"]
    assert not model.head.bias.any()
