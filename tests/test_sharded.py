"""Weights that are normalised while they are sharded: two and four processes do what one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded_runs as runs
import torch
import torch.distributed
from ranks import Ranks
from test_distributed import assert_bit_equal

from benchmarks import sharded_messages
from benchmarks.work.layer_sets import Layer

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

VARIANTS = ("sn", "bssn")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    found = Ranks(tmp_path_factory.mktemp("ranks"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    found = Ranks(tmp_path_factory.mktemp("ranks"), 4)
    yield found
    found.close()


def assert_one_process(results, expected):
    """The same bits on all ranks, and what one process finds, within rounding in fp32."""
    assert_bit_equal(results[1:], results[0])
    assert results[0].keys() == expected.keys()
    torch.testing.assert_close(results[0]["losses"], expected["losses"], rtol=0, atol=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(
            results[0][name], value, rtol=1e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_trained(result):
    assert result["losses"][-1] < 0.8 * result["losses"][0], "nothing was learnt: the comparison says little"


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensor_parallel_is_one_process(ranks, four, variant):
    expected = runs.alone(variant, 20)
    assert_trained(expected)
    for found in (ranks, four):
        assert_one_process(found.run(runs.tensor_parallel, variant, 20), expected)


def test_laws_of_single_layers_are_one_process(ranks):
    expected = runs.laws(20, False)
    assert_trained(expected)
    assert_one_process(ranks.run(runs.laws, 20, True), expected)


def test_the_first_ranks_vectors_are_taken(ranks):
    assert_one_process(ranks.run(runs.seeds, 20, True), runs.seeds(20, False))


@pytest.mark.parametrize(("world", "name"), [(w, n) for w, names in runs.LAYOUTS.items() for n in names])
def test_every_layout_is_one_process(request, world, name):
    found = request.getfixturevalue("four" if world == 4 else "ranks")
    for variant in VARIANTS:
        expected = runs.layout_alone(variant, 20)
        assert_trained(expected)
        assert_one_process(found.run(runs.layout, name, variant, 20), expected)


@pytest.mark.parametrize("blocks", [False, True], ids=["root", "blocks"])
@pytest.mark.parametrize("how", ["fsdp gather", "fsdp reduce"])
def test_fsdp_is_one_process(ranks, how, blocks):
    for variant in VARIANTS:
        assert_one_process(ranks.run(runs.fsdp, variant, how, blocks, 20), runs.alone(variant, 20))


@pytest.mark.parametrize("blocks", [False, True], ids=["root", "blocks"])
@pytest.mark.parametrize("how", ["fsdp reduce", "hybrid gather", "hybrid reduce", "tensor auto", "tensor gather"])
def test_two_dimensions_are_one_process(four, how, blocks):
    for variant in VARIANTS:
        assert_one_process(four.run(runs.fsdp, variant, how, blocks, 20), runs.alone(variant, 20))


UP, DOWN = (20, 10), (10, 20)
EMBED, HEAD = (10, 7), (1, 10)
ALL = (EMBED, UP, DOWN, UP, DOWN, HEAD)
BLOCK = (UP, DOWN)
BLOCKS = BLOCK * 2


def two_halves(shapes):
    """Bytes of the sums of an iteration in fp32, and a number that tells of failures."""
    return [4 * (sum(c[j] for c in shapes) + 1) for j in range(2)]


def numbers(layers, each=1):
    return 4 * (layers * each + 1)


def test_messages_as_they_are_calculated():
    """The table in docs/howto/distributed.md."""
    layers = [Layer("linear", shape) for shape in ALL]
    assert list(sharded_messages.iteration_bytes(layers, "sn")) == two_halves(ALL)
    assert sharded_messages.backward_bytes(layers) == numbers(6)
    assert sharded_messages.table() in (Path(__file__).parents[1] / "docs" / "howto" / "distributed.md").read_text()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_messages_of_tensor_parallel(ranks, variant, n):
    """Linear layers have one direction in each variant. In evaluation three numbers go for each layer."""
    for sent in ranks.run(runs.messages, variant, "tensor parallel", False, n):
        assert sizes(sent) == {
            "forward": two_halves(ALL) * n,
            "backward": [numbers(6)],
            "evaluation": [numbers(6, 3)],
        }


@pytest.mark.parametrize(("how", "blocks"), [("fsdp auto", True), ("fsdp gather", True), ("fsdp reduce", False)])
def test_gathered_weights_need_no_messages(ranks, how, blocks):
    for sent in ranks.run(runs.messages, "bssn", how, blocks, 1):
        assert sizes(sent) == {"forward": [], "backward": [], "evaluation": []}


def test_messages_of_fsdp_that_is_told_to_reduce(ranks):
    for sent in ranks.run(runs.messages, "bssn", "fsdp reduce", True, 1):
        assert sizes(sent) == {"forward": two_halves(BLOCKS), "backward": [], "evaluation": [numbers(4, 3)]}


@pytest.mark.parametrize(
    ("how", "of_blocks"), [("tensor auto", two_halves(BLOCKS)), ("tensor gather", two_halves(BLOCK) * 2)]
)
def test_messages_of_two_dimensions(four, how, of_blocks):
    for sent in four.run(runs.messages, "sn", how, True, 1):
        assert sizes(sent)["forward"] == two_halves((EMBED, HEAD)) + of_blocks
        assert sizes(sent)["backward"] == [numbers(2)] * 3


def sizes(sent):
    assert {name for messages in sent.values() for name, _ in messages} <= {"allreduce_"}
    return {when: [size for _, size in messages] for when, messages in sent.items()}


@pytest.mark.parametrize("what", ["vectors", "memory"])
def test_a_failure_inside_is_heard_by_all_ranks(ranks, what):
    """Before anything has changed, and with the layer's name."""
    first, second = ranks.run(runs.fails_on_one_rank, what)
    kind, text = ("ValueError", "does not fit its layer") if what == "vectors" else ("RuntimeError", "has been freed")
    assert second.startswith(f"{kind}: bssn_fast: ")
    assert "blocks.0.up" in second
    assert text in second
    assert first == f"RuntimeError: bssn_fast: rank 1 has failed: {second}"


def test_a_process_that_ends_ends_the_others(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=runs.ends_in_a_step, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 1
    assert (tmp_path / "1").read_text() == "this rank has failed"
    assert "onnection" in (tmp_path / "0").read_text()


def test_refusals_name_the_layer_and_what_to_do(ranks):
    for said in ranks.run(runs.refusals):
        for what, layer, remedy in (
            ("partial", "0: ", "redistribute(placements=[Replicate()])"),
            ("complex", "0: ", "leave the layer out"),
            ("vector", "0.bias: ", "leave the layer out"),
            ("functional", "weights[0]: ", "full_tensor()"),
            ("gain", "0: ", "`scale` or `at_most`"),
            ("blocks", "0: ", "Use fully_shard"),
            ("blocks of what was sharded later", "bssn_fast: 0: ", "Use fully_shard"),
            ("gain of a function", "gains[0]", "full_tensor()"),
            ("measured", "0: ", "full_tensor()"),
            ("projected", "0: ", "full_tensor()"),
            ("setting", "sharded must be", "'auto', 'gather' or 'reduce'"),
            ("not gathered", "bssn_fast: blocks.0.up: ", "`unshard()`"),
        ):
            assert said[what].startswith(layer), what
            assert remedy in said[what], what
        assert "bssn_fast: 0: a sharded weight" in said["compiled"]
        assert "`torch.compile(model)`" in said["compiled"]
