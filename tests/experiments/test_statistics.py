"""Medians with intervals, and paired comparisons, where runs diverge too."""

from __future__ import annotations

import math

import pytest

from experiments.measures.statistics import compare, median_interval


def test_intervals_count_every_run() -> None:
    interval = median_interval([1.0, 2.0, 3.0, float("inf"), float("nan")])
    assert (interval.median, interval.low, interval.high, interval.n) == (3.0, 1.0, math.inf, 5)
    many = median_interval([float(i) for i in range(101)])
    assert 35 < many.low < many.median == 50 < many.high < 65
    one = median_interval([2.0])
    assert (one.low, one.high, one.n) == (2.0, 2.0, 1)
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


def test_all_diverged_is_infinite() -> None:
    interval = median_interval([math.inf] * 5)
    assert (interval.median, interval.low, interval.high) == (math.inf, math.inf, math.inf)


def test_pairs_of_one_seed_count_once() -> None:
    result = compare([1.0, 4.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], seeds=[0, 0, 1, 1])
    assert (result.wins, result.pairs, result.ratio.n) == (3, 4, 2)
    assert (result.ratio.low, result.ratio.high) == pytest.approx((0.5, 1.0))  # seed 0: the mean of 1/2 and 2


def test_diverged_runs_lose_pairs_and_draw_among_themselves() -> None:
    result = compare([1.0, math.inf, math.inf], [math.inf, 1.0, math.inf], seeds=[0, 1, 2])
    assert result.wins == 1
    assert result.ratio.median == 1.0
    assert (result.ratio.low, result.ratio.high) == (0.0, math.inf)
    with pytest.raises(ValueError, match="differ in number"):
        compare([1.0], [1.0], seeds=[0, 1])


def test_one_diverged_run_of_several_pairs_of_a_seed():
    """The mean of the ratios is that of an infinity, however many others there are."""
    result = compare([1.0] * 6, [2.0, 2.0, math.inf] * 2, seeds=[0, 0, 0, 1, 1, 1])
    assert str(result.ratio) == "0 [0, 0]"
