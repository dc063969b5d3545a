"""torch.distributed, two processes on the CPU: DDP, FSDP2, and what is refused."""

from __future__ import annotations

import functools

import distributed_runs as runs
import pytest
import torch
import torch.distributed
from ranks import Ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    found = Ranks(tmp_path_factory.mktemp("ranks"))
    yield found
    found.close()


def assert_bit_equal(results, expected):
    for found in results:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def assert_close(results, expected):
    """In float64 after training: the order of sums is all that differs."""
    for found in results:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )


def assert_trained(result):
    assert result["losses"][-1] < 0.8 * result["losses"][0], "nothing was learnt: the comparison says little"


@pytest.mark.parametrize(
    ("outer", "gradient_groups"), [(False, 1), (True, 1), (False, 3)], ids=["model", "inner", "gradient_groups"]
)
def test_ddp_with_the_same_data_is_one_process(ranks, outer, gradient_groups):
    """Default flags: buffers are broadcast at each forward."""
    results = ranks.run(functools.partial(runs.ddp, gradient_groups=gradient_groups), 50, outer, False)
    if outer:
        assert_bit_equal(results[1:], results[0])  # the outer module's parameter is trained, too
        return
    assert_bit_equal(results, runs.alone(50))


def test_ddp_with_half_the_data_each_is_one_process(ranks):
    results = ranks.run(runs.ddp, 50, False, True)
    expected = runs.alone(50)
    assert_trained(expected)
    assert_bit_equal(results[1:], results[0])
    assert_close(results, expected)


def test_ddp_with_gains_bounds_and_blocks_is_one_process(ranks):
    results = ranks.run(functools.partial(runs.ddp, **runs.LAWS), 50, False, True)
    expected = runs.alone(50, **runs.LAWS)
    before = {name: gain for name, gain in runs.alone(0, **runs.LAWS).items() if name.endswith("gain")}
    assert sorted(map(len, before.values())) == [1, 3]
    assert all((expected[name] - gain).abs().max() > 1e-2 for name, gain in before.items()), "gains are trained"
    assert_bit_equal(results[1:], results[0])
    assert_close(results, expected)


@pytest.mark.parametrize("gradient_groups", [1, 2])
def test_ddp_with_no_sync_is_one_process(ranks, gradient_groups):
    results = ranks.run(runs.ddp_accumulation, 3, gradient_groups)
    assert_bit_equal(results[1:], results[0])
    assert_close(results, runs.accumulation_alone(3))


@pytest.mark.parametrize(("gradient_groups", "expected"), [(1, "0000"), (2, "2200"), (4, "3210")])
def test_ddp_sends_gradients_while_the_backward_pass_goes_on(ranks, gradient_groups, expected):
    for sent in ranks.run(runs.ddp_progress, gradient_groups):
        assert "".join(sent) == expected


def test_what_ddp_broadcasts_is_used(ranks):
    first, second = ranks.run(runs.ddp_broadcast)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("how", ["access", "alone", "whole"])
def test_ddp_with_checkpoints_around_parts_and_several_samples(ranks, how, use_reentrant):
    """One backward pass for all samples; the numbers are those of torch's norm."""
    for found, expected in ranks.run(runs.ddp_samples, how, use_reentrant):
        assert_close([found], expected)


def test_collectives_into_weights_in_a_block(ranks):
    """gloo writes past torch's versions."""
    for outputs in ranks.run(runs.reduced_in_a_block):
        for (found, expected), (before, _) in zip(outputs[1:], outputs, strict=False):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            assert not torch.allclose(found, before, rtol=1e-6)


@pytest.mark.parametrize("how", ["root", "resharded root", "blocks", "layers", "together"])
def test_fsdp_is_one_process(ranks, how):
    results = ranks.run(runs.fsdp, 20, how)
    assert_bit_equal(results[1:], results[0])
    assert_close(results, runs.alone(20))


@pytest.mark.parametrize("how", ["root", "blocks"])
def test_fsdp_with_cached(ranks, how):
    results = ranks.run(runs.fsdp, 10, how, True)
    assert_close(results, runs.alone(10, share=True))


@pytest.mark.parametrize("how", ["root", "blocks"])
def test_fsdp_with_checkpoints(ranks, how):
    results = ranks.run(runs.fsdp, 10, how, True, True)
    assert_close(results, runs.alone(10, share=True, recompute=True))


@pytest.mark.parametrize("how", ["root", "resharded root", "blocks"])
def test_fsdp_evaluation_sees_every_change(ranks, how):
    for found, expected in ranks.run(runs.fsdp_evaluation, how):
        assert not torch.allclose(expected[0], expected[1], rtol=1e-6)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gain", [False, True])
def test_fsdp_diagnostics_are_those_of_one_process(ranks, gain):
    expected = runs.fsdp_diagnostics(False, gain)
    assert {"0[0].sigma", "0[1].gradient", "1.variance", "2[2].gradient"} < expected.keys()
    for found in ranks.run(runs.fsdp_diagnostics, True, gain):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda m, name=name: f"{name}: {m}")


def test_refusals_name_the_layer_and_what_to_do(ranks):
    for said in ranks.run(runs.refusals):
        for what, layer in (("read before the first call", "first"), ("read after a call", "blocks.1.0")):
            assert said[what].startswith(f"bssn_fast: {layer}: FSDP has sharded the weight and not gathered it. Use")
        for what in ("apply after fully_shard", "apply while unsharded", "remove while unsharded"):
            assert said[what].startswith("first: FSDP manages the weight.")
        assert said["read after unshard"] == "(6, 3, 3, 3)"
        assert "blocks.1.0: a sharded weight cannot have a learned gain" in said["gain in a sharded block"]
        assert "before wrapping in DistributedDataParallel" in said["apply after DDP"]
        assert "Use fully_shard" in said["FullyShardedDataParallel False"]
        assert "Use fully_shard" in said["FullyShardedDataParallel True"]


@pytest.mark.parametrize(
    ("inside", "gradient_groups"), [(False, 1), (True, 1), (True, 2)], ids=["compiled_ddp", "ddp_of_compiled", "groups"]
)
def test_ddp_and_compile_are_one_process(ranks, inside, gradient_groups):
    results = ranks.run(runs.ddp_compiled, 50, inside, gradient_groups)
    assert_bit_equal(results[1:], results[0])
    assert_close(results, runs.alone(50))


@pytest.mark.parametrize("how", ["root", "blocks"])
def test_fsdp_and_compile_are_one_process(ranks, how):
    results = ranks.run(runs.fsdp_compiled, 10, how)
    assert_bit_equal(results[1:], results[0])
    assert_close(results, runs.alone(10))
