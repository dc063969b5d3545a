"""Weights without training: operators against dense algebra, closed forms, gradients against depth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import conv2d, pad

from benchmarks.work.layer_sets import Layer, LayerSet
from experiments.measures import depth, spectra
from experiments.plan import DEPTHS, Case


@pytest.mark.parametrize("channels", [(6, 4), (3, 3), (4, 6)])
def test_operator_norm_is_that_of_the_dense_circular_convolution(channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(*channels, 3, 3, dtype=torch.float64)
    n = 5
    basis = torch.eye(channels[1] * n * n, dtype=torch.float64).view(-1, channels[1], n, n)
    matrix = conv2d(pad(basis, (1, 1, 1, 1), mode="circular"), weight).flatten(1)
    expected = torch.linalg.matrix_norm(matrix, 2).item()
    assert spectra.operator_norm(weight, 0, grid=n) == pytest.approx(expected, rel=1e-12)
    assert spectra.operator_norm(weight.transpose(0, 1), 1, grid=n) == pytest.approx(expected, rel=1e-12)


def test_operator_norm_of_groups_is_the_largest_of_theirs() -> None:
    weight = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    whole = spectra.operator_norm(weight, 0, groups=3, grid=8)
    assert whole == pytest.approx(max(spectra.operator_norm(part, 0, grid=8) for part in weight.chunk(3)), rel=1e-5)


def test_large_matrices_and_both_unfoldings() -> None:
    weight = torch.randn(150, 140, 3, generator=torch.Generator().manual_seed(0))
    s_out, s_in = spectra.reshaped_norms(weight, 0)
    assert s_out == pytest.approx(torch.linalg.matrix_norm(weight.flatten(1), 2).item(), rel=1e-5)
    assert s_in == pytest.approx(torch.linalg.matrix_norm(weight.transpose(0, 1).flatten(1), 2).item(), rel=1e-5)
    blocks = torch.randn(2, 150, 130, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    assert spectra.largest_singular_value(blocks) == pytest.approx(torch.linalg.svdvals(blocks).max().item(), rel=1e-5)


@pytest.mark.parametrize(
    "layer", [Layer("conv", (32, 16, 3, 3)), Layer("convT", (16, 8, 4, 4)), Layer("linear", (9, 40))]
)
def test_layers_keep_the_bound_and_come_near_the_closed_forms(layer: Layer) -> None:
    row = spectra._layer_row(layer)
    assert row["var_sn"] == pytest.approx(row["var_sn_closed"], rel=0.25)
    assert row["var_sn"] <= row["lecun"]
    if layer.kind == "linear":
        assert row["operator"] is None
        assert row["var_bsn"] == pytest.approx(row["var_sn"])
    else:
        assert row["var_bsn"] == pytest.approx(row["var_bsn_closed"], rel=0.25)
        assert row["operator"] <= row["bound"]


def test_layers_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {name: LayerSet(name, "", (Layer("conv", (4, 3, 3)),) * 2) for name in "ab"}
    rows = spectra.layer_rows(sets, tmp_path)
    monkeypatch.delattr(spectra, "_layer_row")
    assert spectra.layer_rows(sets, tmp_path) == rows
    assert [(row["set"], row["count"]) for row in rows] == [("a", 2), ("b", 2)]


def test_slope_of_a_linear_model_is_its_weight() -> None:
    class Linear(torch.nn.Module):
        def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return 3 * images.flatten(1)[:, 0]

    assert depth.slope(Linear(), torch.zeros(2, 3, 4, 4)) == pytest.approx(3)


def test_initial_gradients_compound_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "SCALES", (0.5, 1.0, 2.0))
    monkeypatch.setattr(depth, "SETTLING", 5)
    rows = depth.rows(1, 4)
    cases = [Case("none"), Case("sn"), Case("bsn"), *(Case(n, c) for n in ("ssn", "bssn") for c in (0.5, 2.0))]
    assert len(rows) == len(DEPTHS) * len(cases)
    slopes = {(row["layers"], row["norm"], row["scale"]): row["slope"] for row in rows}
    for layers in DEPTHS.values():  # 2 from each layer, less what biases do to the rectifiers
        ratio = slopes[layers, "ssn", 2.0] / slopes[layers, "sn", 1.0]
        assert 2.0 ** (layers - 2) < ratio < 2.0 ** (layers + 1)
        assert slopes[layers, "bssn", 0.5] < slopes[layers, "bsn", 1.0] < slopes[layers, "bssn", 2.0]
