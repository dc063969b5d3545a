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


CONVERSIONS = {
    "double": lambda model: model.double(),
    "to": lambda model: model.to(torch.float64),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "back_from_bfloat16": lambda model: model.bfloat16().float().double(),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("change", [*CONVERSIONS, "load", "load_and_assign"])
def test_changes(state, change):
    """Before the first use, and again after it."""
    model = bssn_fast.apply(Net())
    for _ in range(2):
        STATES[state](model)
        if change in CONVERSIONS:
            rounded = torch.bfloat16 if change == "back_from_bfloat16" else torch.float32
            dtype = torch.float32 if change == "channels_last" else torch.float64
            expected = {n: original(model.get_submodule(n)).detach().to(rounded).to(dtype) for n in norms(model)}
            CONVERSIONS[change](model)
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
