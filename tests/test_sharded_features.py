"""Sharded models in two processes: mixed precision, moving averages, checkpoints, recomputation, compilation."""

from __future__ import annotations

import pytest
import sharded_features as features
import torch
import torch.distributed
from ranks import THIRD_DERIVATIVES, Ranks
from support import vectors_of
from test_sharded import assert_bit_equal, assert_one_process
from torch import nn

import bssn_fast

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    found = Ranks(tmp_path_factory.mktemp("ranks"))
    yield found
    found.close()


@pytest.mark.parametrize("how", features.HOWS)
@pytest.mark.parametrize("feature", ["cached", "recompute", "ema", "compiled", "inference_mode"])
def test_features_are_one_process(ranks, feature, how):
    run = getattr(features, feature)
    assert_one_process(ranks.run(run, how), run(""))


@pytest.mark.parametrize("feature", ["cached", "recompute", "ema", "compiled"])
def test_features_in_two_dimensions_are_one_process(four, feature):
    run = getattr(features, feature)
    assert_one_process(four.run(run, "tensor auto blocks"), run(""))


def test_all_else_of_tensor_parallel_is_one_process(ranks):
    expected = features.corners("")
    results = ranks.run(features.corners, "tensor parallel")
    assert_bit_equal(results[1:], results[0])
    for name, value in expected.items():
        atol = 0.1 if name == "autocast" else 2e-5
        torch.testing.assert_close(
            results[0][name], value, rtol=1e-5, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    found = Ranks(tmp_path_factory.mktemp("ranks"), 4)
    yield found
    found.close()


@pytest.mark.parametrize("how", features.HOWS)
def test_a_distributed_checkpoint_goes_on(ranks, how, tmp_path):
    for straight, again in ranks.run(features.resume, how, str(tmp_path)):
        assert_bit_equal([again], straight)


@pytest.mark.parametrize("how", features.HOWS[:2])
def test_bf16_is_one_process_bit_by_bit(ranks, how):
    """The gathered weights are those of a model in bfloat16, and so is all that is computed with them."""
    assert_bit_equal(ranks.run(features.bf16, how), features.bf16(""))


@pytest.mark.parametrize(("world", "how"), [(2, "fsdp reduce blocks"), (4, "tensor auto blocks")])
def test_bf16_with_sigma_of_the_shards(request, world, how):
    """Sigma is that of the weights in float32, and not of their rounded copies."""
    results = request.getfixturevalue("four" if world == 4 else "ranks").run(features.bf16, how)
    assert_bit_equal(results[1:], results[0])
    for name, value in features.bf16("").items():
        torch.testing.assert_close(results[0][name], value, rtol=0.02, atol=0.03, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_of_gradients(ranks):
    expected = features.double_backward(False)
    if not THIRD_DERIVATIVES:
        del expected["third"]
    for found in ranks.run(features.double_backward, True):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("how", ["auto", "gather"])
def test_fully_shard_after_a_call_with_tensor_parallelism(ranks, how):
    torch.manual_seed(0)
    model = bssn_fast.apply(nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False)))
    model(torch.ones(3, 4))
    expected = {"loss": model(torch.ones(3, 4)).square().mean().detach(), **vectors_of(model)}
    for found in ranks.run(features.fully_sharded_after_a_call, how):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda m, name=name: f"{name}: {m}")
