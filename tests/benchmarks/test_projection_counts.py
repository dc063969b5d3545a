"""The table of docs/laws.md: what projecting costs beside a plain loop."""

import re
from pathlib import Path

import torch

import bssn_fast
from benchmarks import projection

PAGE = Path(__file__).parents[2] / "docs" / "laws.md"


def test_one_operation_and_no_wait():
    weights = [torch.randn(8, 6) for _ in range(10)]
    ours = bssn_fast.Projection(weights, radius=1.0)
    assert projection.count(ours) == (1, 0)
    plain = projection.count(lambda: projection.plain_loop(weights, 1.0))
    assert plain.waits == 10
    assert plain.operations > 500


def test_the_page_has_these_numbers(capsys):
    projection.main()
    printed = capsys.readouterr().out
    assert re.search(r"\| 64 \| 1 \| 0 \|", printed)
    assert printed in PAGE.read_text()
