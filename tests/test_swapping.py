"""With torch's flag to swap parameters instead of writing into them, models are converted and loaded as without."""

import copy

import pytest
import torch
from support import Net, images, norms, original
from test_loading import assert_sigma_right

import bssn_fast


@pytest.fixture(autouse=True)
def _swap():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def nothing(model):
    pass


def read(model):
    model.first.weight.sum().item()


def train(model):
    model(images(2, next(model.parameters()).dtype)).sum().backward()
    model.zero_grad()


def evaluate(model):
    model.eval()(images(2, next(model.parameters()).dtype))
    model.train()


def reset(model):
    model.first.reset_parameters()  # writes into `weight`


def in_a_block(model):
    with bssn_fast.cached(model):
        train(model)


STATES = {f.__name__: f for f in (nothing, read, train, evaluate, reset, in_a_block)}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("change", ["double", "load", "load_and_assign"])
def test_changes(state, change):
    model = bssn_fast.apply(Net())
    for _ in range(2):
        STATES[state](model)
        if change == "double":
            expected = {n: original(model.get_submodule(n)).detach().double() for n in norms(model)}
            model.double()
        else:
            theirs = copy.deepcopy(Net().to(next(model.parameters()).dtype).state_dict())
            model.load_state_dict(theirs, assign=change == "load_and_assign")
            expected = {n: theirs[f"{n}.weight"] for n in norms(model)}
        for name, value in expected.items():
            assert torch.equal(original(model.get_submodule(name)).detach(), value)
        train(model)
        model.eval()(images(2, next(model.parameters()).dtype))
        assert_sigma_right(model, rel=0.03)
        model.train()
        model.float()
