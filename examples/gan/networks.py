"""Convolutional GANs, class-conditional and as in the BSSN paper, and the normalisation of the discriminator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import bssn_fast

NORMS = ("none", "torch-sn", "sn", "ssn", "bsn", "bssn")
SCALED_NORMS = ("ssn", "bssn")


def levels(size: int) -> int:
    """Return how often a size x size image is halved until it is 4 x 4; raises ValueError if that is impossible."""
    n = size.bit_length() - 3
    if n < 1 or size != 4 << n:
        raise ValueError(f"the image size must be 8, 16, 32, ...; got {size}")
    return n


def growing(widths: list[int]) -> nn.Sequential:
    """Return a generator's middle: one transposed convolution, which doubles the size, from each width to the next."""
    blocks = []
    for before, after in pairwise(widths):
        blocks += [nn.BatchNorm2d(before), nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1)]
    return nn.Sequential(*blocks)


def to_image(width: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1), nn.Tanh())


class Generator(nn.Module):
    """Noise [n, noise_dim] and labels [n] -> images [n, channels, size, size] in (-1, 1)."""

    def __init__(self, channels: int, size: int, n_classes: int, noise_dim: int, width: int) -> None:
        super().__init__()
        n = levels(size)
        widths = [width * 2 ** min(n - i, 2) for i in range(n + 1)]
        self.noise_dim = noise_dim
        self.embedding = nn.Embedding(n_classes, noise_dim)
        self.stem = nn.Sequential(nn.Linear(2 * noise_dim, widths[0] * 16), nn.Unflatten(1, (widths[0], 4, 4)))
        self.blocks, self.to_image = growing(widths), to_image(width, channels)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        x = torch.cat([noise, self.embedding(labels)], dim=1)
        return self.to_image(self.blocks(self.stem(x)))


class Discriminator(nn.Module):
    """Images [n, channels, size, size] and labels [n] -> scores [n], by projection on the label's embedding.

    Miyato and Koyama, "cGANs with Projection Discriminator", ICLR 2018.
    """

    def __init__(self, channels: int, size: int, n_classes: int, width: int) -> None:
        super().__init__()
        n = levels(size)
        widths = [width * 2 ** min(i, 2) for i in range(n + 1)]
        blocks = [nn.Conv2d(channels, width, 3, padding=1), nn.LeakyReLU(0.1)]
        for before, after in pairwise(widths):
            blocks += [nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(0.1)]
            blocks += [nn.Conv2d(after, after, 3, padding=1), nn.LeakyReLU(0.1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], 1)
        self.embedding = nn.Embedding(n_classes, widths[-1])

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        features = self.blocks(images).sum(dim=(2, 3))
        return self.head(features).squeeze(1) + (features * self.embedding(labels)).sum(dim=1)


class PaperGenerator(nn.Module):
    """Noise [n, noise_dim] -> images [n, channels, size, size] in (-1, 1); the labels are not used.

    The CNN of Lin, Sekar and Fanti's experiments, which has width 64 and, at size 32, three transposed convolutions.
    """

    def __init__(self, channels: int, size: int, n_classes: int, noise_dim: int, width: int) -> None:
        super().__init__()
        n = levels(size)
        widths = [width * 2 ** (n - i) for i in range(n + 1)]
        self.stem = nn.Sequential(nn.Linear(noise_dim, widths[0] * 16), nn.Unflatten(1, (widths[0], 4, 4)))
        self.blocks, self.to_image = growing(widths), to_image(width, channels)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        return self.to_image(self.blocks(self.stem(noise)))


class PaperDiscriminator(nn.Module):
    """Images [n, channels, size, size] -> scores [n]; the labels are not used.

    The CNN of Lin, Sekar and Fanti's experiments, which has width 64 and, at size 32, seven convolutions.
    `plain` is how many 3 x 3 convolutions each resolution has: one in theirs. Other numbers make the same network of
    another depth: at size 32, 0, 1, 2 and 3 give 4, 8, 12 and 16 layers.
    """

    def __init__(self, channels: int, size: int, n_classes: int, width: int, plain: int = 1) -> None:
        super().__init__()
        n = levels(size)
        blocks: list[nn.Module] = []
        before = channels
        for level in range(n + 1):
            wide = width * 2**level
            for _ in range(plain):
                blocks += [nn.Conv2d(before, wide, 3, padding=1), nn.LeakyReLU(0.1)]
                before = wide
            if level < n:
                blocks += [nn.Conv2d(before, wide, 4, 2, 1), nn.LeakyReLU(0.1)]
                before = wide
        self.blocks = nn.Sequential(*blocks, nn.Flatten())
        self.head = nn.Linear(before * 16, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.blocks(images)).squeeze(1)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, x [n, before, h, h] -> [n, after, h / 2 or h, same]."""

    def __init__(self, before: int, after: int, halve: bool, first: bool = False) -> None:
        super().__init__()
        pool: list[nn.Module] = [nn.AvgPool2d(2)] if halve else []
        start: list[nn.Module] = [] if first else [nn.ReLU()]  # the image itself is not rectified
        convs = [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.Conv2d(after, after, 3, padding=1)]
        self.residual = nn.Sequential(*start, *convs, *pool)
        shortcut = [nn.Conv2d(before, after, 1)] if halve or before != after else []
        self.shortcut = nn.Sequential(*shortcut, *pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class ResidualDiscriminator(nn.Module):
    """Images [n, channels, size, size] -> scores [n]; the labels are not used.

    The residual network that Miyato and others use at size 32 (ICLR 2018), there with width 128.
    """

    def __init__(self, channels: int, size: int, n_classes: int, width: int) -> None:
        super().__init__()
        halving = [ResidualBlock(width if i else channels, width, halve=True, first=not i) for i in range(levels(size))]
        self.blocks = nn.Sequential(*halving, ResidualBlock(width, width, halve=False), nn.ReLU())
        self.head = nn.Linear(width, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.head(self.blocks(images).sum(dim=(2, 3))).squeeze(1)


NETWORKS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "projection": (Generator, Discriminator),
    "paper": (PaperGenerator, PaperDiscriminator),
    "paper-shallow": (PaperGenerator, partial(PaperDiscriminator, plain=0)),
    "paper-deep": (PaperGenerator, partial(PaperDiscriminator, plain=3)),
    "residual": (PaperGenerator, ResidualDiscriminator),
}
"""Generator and discriminator by name. At size 32 the paper's has 8 layers, "shallow" 4 and "deep" 16."""


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that carry a weight to normalise, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))}


def normalize(discriminator: nn.Module, norm: str, scale: float) -> None:
    """Normalise all weights in place: by bssn_fast, by torch's own spectral_norm ("torch-sn") or not at all."""
    if norm == "torch-sn":
        for layer in weight_layers(discriminator).values():
            spectral_norm(layer)
    elif norm != "none":
        bssn_fast.apply(discriminator, norm, scale=scale if norm in SCALED_NORMS else None)


def raw_weight(layer: nn.Module) -> Tensor:
    """Return the parameter behind a layer's weight, normalised or not."""
    return layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else layer.weight


@torch.no_grad()
def sigmas(discriminator: nn.Module, norm: str) -> dict[str, float]:
    """Return sigma by layer: what bssn_fast divides by, and the exact spectral norm where it is not in use."""
    if norm in ("none", "torch-sn"):
        layers = weight_layers(discriminator).items()
        return {name: torch.linalg.matrix_norm(raw_weight(m).flatten(1), 2).item() for name, m in layers}
    return {name: value.item() for name, value in bssn_fast.sigma(discriminator).items()}


def gradient_norms(discriminator: nn.Module) -> dict[str, float]:
    """Return the Euclidean norm of the gradient of each layer's weight."""
    return {name: raw_weight(m).grad.norm().item() for name, m in weight_layers(discriminator).items()}
