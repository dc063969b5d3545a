"""Weights that are normalised while they are sharded: two and four processes do what one does."""

from __future__ import annotations

import pytest
import sharded_runs as runs
import torch
import torch.distributed
from ranks import Ranks
from test_distributed import assert_bit_equal

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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("world", "name"), [(w, n) for w, names in runs.LAYOUTS.items() for n in names])
def test_every_layout_is_one_process(request, world, name, variant):
    found = request.getfixturevalue("four" if world == 4 else "ranks")
    expected = runs.layout_alone(variant, 20)
    assert_trained(expected)
    assert_one_process(found.run(runs.layout, name, variant, 20), expected)
