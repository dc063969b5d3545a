"""The switched training: one start, the same random numbers, losses that stay together."""

from __future__ import annotations

import torch

from experiments import switching


def test_all_ways_start_from_the_same_weights_and_vectors() -> None:
    runs = switching.trainings(width=4, steps=3)
    states = {way: run.discriminator.state_dict() for way, run in runs.items()}
    assert states["torch"].keys() == states["sn"].keys()
    assert all(torch.equal(states["torch"][key], states["sn"][key]) for key in states["torch"])
    key = "head.parametrizations.weight.original"
    apart = (states["rounded"][key] - states["torch"][key]).abs().max()
    assert 0 < apart < 1e-7


def test_losses_agree_as_far_as_rounding_lets_them() -> None:
    rows = switching.rows(steps=2, width=4, batch=4)
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        for loss in ("generator", "discriminator"):
            assert abs(row[f"{loss}_sn"] - row[f"{loss}_torch"]) < 1e-4
            assert row[f"{loss}_torch"] != 0
    assert all(row[f"seconds_{way}"] > 0 for row in rows for way in switching.WAYS)


def test_losses_agree_to_the_last_digits_in_double_precision() -> None:
    for row in switching.rows(steps=2, width=4, batch=4, dtype=torch.float64):
        for loss in ("generator", "discriminator"):
            assert abs(row[f"{loss}_sn"] - row[f"{loss}_torch"]) < 1e-11


def test_rates_fall_to_zero() -> None:
    run = switching.trainings(width=4, steps=2)["sn"]
    run.step(torch.zeros(2, 3, 32, 32), seed=0)
    assert [adam.param_groups[0]["lr"] for adam in run.adams] == [switching.RATE / 2] * 2
    run.step(torch.zeros(2, 3, 32, 32), seed=1)
    assert [adam.param_groups[0]["lr"] for adam in run.adams] == [0, 0]
