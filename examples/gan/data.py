"""Real images as one tensor in memory, by name: scikit-learn's digits and photographs, an image folder, CIFAR10."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.nn.functional import interpolate

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


class DataError(Exception):
    """The data asked for cannot be loaded; the message says why and what to do."""


@dataclass(frozen=True)
class Images:
    """`pixels` [n, channels, size, size], fp32 in [-1, 1]; `labels` [n], int64; one name per class."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """Return n images drawn with replacement by torch's global generator, and their labels."""
        index = torch.randint(len(self.pixels), (n,)).to(self.pixels.device)
        return self.pixels[index], self.labels[index]

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device), self.classes)


def load(data: str, size: int, cifar10_root: str) -> Images:
    """Return the images called "digits", "photos" or "cifar10", or those of the folder `data`, at size x size.

    Raises DataError.
    """
    if data == "digits":
        return _digits(size)
    if data == "photos":
        return _photos(size)
    if data == "cifar10":
        return _cifar10(size, cifar10_root)
    if Path(data).is_dir():
        return _folder(Path(data), size)
    raise DataError(f"--data {data}: neither digits nor photos nor cifar10 nor an existing folder of images")


def _resize(pixels: Tensor, size: int) -> Tensor:
    if pixels.shape[-1] == size:
        return pixels
    return interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def _digits(size: int) -> Images:
    digits = load_digits()  # 1,797 scans of 8 x 8 pixels with the values 0 to 16
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    return Images(_resize(pixels, size), torch.tensor(digits.target), tuple("0123456789"))


def _photos(size: int) -> Images:
    """Patches of the two photographs that scikit-learn ships; the classes are the quarters that the patches lie in."""
    side, stride = 2 * size, 16
    pixels, labels = [], []
    for photo, array in enumerate(load_sample_images().images):  # [427, 640, 3], uint8
        windows = torch.tensor(array).float().unfold(0, side, stride).unfold(1, side, stride)  # [rows, columns, 3, ...]
        rows, columns = windows.shape[:2]
        pixels.append(windows.flatten(0, 1) / 127.5 - 1)
        lower = (torch.arange(rows) >= rows / 2).long()[:, None]
        right = (torch.arange(columns) >= columns / 2).long()
        labels.append((4 * photo + 2 * lower + right).flatten())
    quarters = [f"{v} {h}" for v in ("upper", "lower") for h in ("left", "right")]
    classes = tuple(f"{photo}, {quarter}" for photo in ("temple", "flower") for quarter in quarters)
    return Images(_resize(torch.cat(pixels), size), torch.cat(labels), classes)


def _cifar10(size: int, root: str) -> Images:
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise DataError("--data cifar10 needs torchvision: pip install torchvision") from error
    try:
        cifar10 = CIFAR10(root, train=True)
    except RuntimeError as error:
        raise DataError(
            f"--data cifar10: no CIFAR10 files in {root!r}; give their folder with --cifar10-root, or fetch them with "
            f"torchvision.datasets.CIFAR10({root!r}, download=True)"
        ) from error
    pixels = torch.from_numpy(cifar10.data).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Images(_resize(pixels, size), torch.tensor(cifar10.targets), tuple(cifar10.classes))


def _folder(root: Path, size: int) -> Images:
    """Images of `root`, in RGB, cut to a square; its subfolders are the classes, and without any there is one class."""
    subfolders = sorted(path for path in root.iterdir() if path.is_dir())
    pixels, labels, classes = [], [], []
    for folder in subfolders or [root]:
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if found:
            pixels += [_read(path, size) for path in found]
            labels += [len(classes)] * len(found)
            classes.append(folder.name)
    if not pixels:
        raise DataError(f"--data {root}: no images there (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return Images(torch.stack(pixels), torch.tensor(labels), tuple(classes))


def _read(path: Path, size: int) -> Tensor:
    with Image.open(path) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert("RGB").crop((left, top, left + side, top + side))
        array = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    return torch.tensor(array).permute(2, 0, 1).float() / 127.5 - 1
