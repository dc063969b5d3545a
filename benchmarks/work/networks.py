"""Two discriminators and a generator of the literature, for whole training steps at 32 x 32 pixels.

At full width their layers are those of the sets bsn_cnn_d32, sngan_d32 and dcgan_g32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, leaky_relu, relu

NOISE = 128


class CnnDiscriminator(nn.Module):
    """Images [n, 3, 32, 32] -> scores [n]: the plain discriminator of spectral normalisation's papers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        w = width
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(3, w, 3, 1, 1),
                nn.Conv2d(w, w, 4, 2, 1),
                nn.Conv2d(w, 2 * w, 3, 1, 1),
                nn.Conv2d(2 * w, 2 * w, 4, 2, 1),
                nn.Conv2d(2 * w, 4 * w, 3, 1, 1),
                nn.Conv2d(4 * w, 4 * w, 4, 2, 1),
                nn.Conv2d(4 * w, 8 * w, 3, 1, 1),
            ]
        )
        self.head = nn.Linear(8 * w * 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = leaky_relu(layer(x), 0.1)
        return self.head(x.flatten(1)).squeeze(1)


class _Block(nn.Module):
    def __init__(self, before: int, after: int, *, first: bool = False, down: bool = False) -> None:
        super().__init__()
        self.first, self.down = first, down
        self.a, self.b = nn.Conv2d(before, after, 3, 1, 1), nn.Conv2d(after, after, 3, 1, 1)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after or down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.b(relu(self.a(x if self.first else relu(x))))
        outer = self.shortcut(x)
        return avg_pool2d(inner, 2) + avg_pool2d(outer, 2) if self.down else inner + outer


class ResidualDiscriminator(nn.Module):
    """Images [n, 3, 32, 32] -> scores [n]: four residual blocks."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        w = width
        self.blocks = nn.Sequential(
            _Block(3, w, first=True, down=True), _Block(w, w, down=True), _Block(w, w), _Block(w, w)
        )
        self.head = nn.Linear(w, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(relu(self.blocks(x)).sum(dim=(2, 3))).squeeze(1)


class Generator(nn.Module):
    """Noise [n, 128] -> images [n, 3, 32, 32]: transposed convolutions."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        w = width
        self.stem = nn.Linear(NOISE, 8 * w * 16)
        self.layers = nn.ModuleList(nn.ConvTranspose2d(c, c // 2, 4, 2, 1) for c in (8 * w, 4 * w, 2 * w))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c // 2) for c in (8 * w, 4 * w, 2 * w))
        self.to_image = nn.Conv2d(w, 3, 3, 1, 1)

    def forward(self, noise: Tensor) -> Tensor:
        x = self.stem(noise).unflatten(1, (-1, 4, 4))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = relu(norm(layer(x)))
        return torch.tanh(self.to_image(x))


DISCRIMINATORS = {"cnn": CnnDiscriminator, "residual": ResidualDiscriminator}


def weight_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose weights are normalised, in the model's order."""
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
