"""Pipeline parallelism: stages that are normalised train as those with torch's spectral norms do."""

import pipeline_runs as runs
import pytest
import torch
from ranks import Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    found = Ranks(tmp_path_factory.mktemp("ranks"))
    yield found
    found.close()


@pytest.mark.parametrize(
    ("schedule", "update"),
    [
        ("ScheduleGPipe", "forward"),
        ("Schedule1F1B", "forward"),
        ("ScheduleInterleaved1F1B", "forward"),
        ("ScheduleInterleaved1F1B", "access"),
        ("ScheduleInterleavedZeroBubble", "access"),  # needs a graph for each layer's weight
    ],
)
def test_as_with_torchs_norms(ranks, schedule, update):
    for found, expected in zip(
        ranks.run(runs.train, schedule, update), ranks.run(runs.train, schedule, ""), strict=True
    ):
        torch.testing.assert_close(found, expected)
