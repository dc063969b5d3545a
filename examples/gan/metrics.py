"""Frechet distance between real and generated images in the feature space of a small classifier of the real ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from gan.data import Images
from gan.networks import levels

FEATURES = 64
CLASSIFIER_SEED = 0
"""The classifier does not depend on the training's seed, so that distances of different runs can be compared."""


@dataclass(frozen=True)
class Quality:
    """How close generated images are to the real ones of the same labels."""

    frechet: float
    frechet_of_real_halves: float
    """What two random halves of the real images are apart, to judge the other by; whole sets would be closer."""
    label_agreement: float
    """Share of generated images that the classifier takes for the class they were generated as."""
    classifier_accuracy: float
    """Of the classifier, on the real images that it was not trained on."""


class Classifier(nn.Module):
    """Images [n, channels, size, size] -> logits [n, classes]; `features` gives [n, FEATURES]."""

    def __init__(self, channels: int, size: int, n_classes: int) -> None:
        super().__init__()
        widths = [channels] + [32] * levels(size)
        blocks = []
        for before, after in pairwise(widths):
            blocks += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(widths[-1] * 16, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def train_classifier(images: Images, steps: int = 400, batch: int = 64) -> tuple[Classifier, float]:
    """Return a classifier, in evaluation mode, trained on four fifths of `images`, and its accuracy on the rest."""
    device = images.pixels.device
    order = torch.randperm(len(images.pixels)).to(device)
    held_out, used = order.tensor_split([max(1, len(order) // 5)])
    model = Classifier(*images.pixels.shape[1:3], len(images.classes)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        index = used[torch.randint(len(used), (batch,)).to(device)]
        loss = nn.functional.cross_entropy(model(images.pixels[index]), images.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return model, accuracy(model, images.pixels[held_out], images.labels[held_out])


@torch.no_grad()
def accuracy(model: Classifier, pixels: Tensor, labels: Tensor) -> float:
    """Return the share of images that the model takes for their label."""
    predicted = torch.cat([model(part).argmax(1) for part in pixels.split(512)])
    return (predicted == labels).float().mean().item()


@torch.no_grad()
def extract(model: Classifier, pixels: Tensor) -> Tensor:
    """Return the features [n, FEATURES] in fp64 on the CPU."""
    return torch.cat([model.features(part) for part in pixels.split(512)]).double().cpu()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features [n, d] in fp64.

    tr (C_a C_b)^(1/2) is the sum of the singular values of R_a R_b, R being the symmetric square root of C.
    """

    def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        covariance = torch.cov(x.T)
        values, vectors = torch.linalg.eigh(covariance)
        return x.mean(0), covariance.trace(), vectors * values.clamp_min(0).sqrt() @ vectors.T

    mean_a, trace_a, root_a = moments(a)
    mean_b, trace_b, root_b = moments(b)
    common = torch.linalg.svdvals(root_a @ root_b).sum()
    return ((mean_a - mean_b).square().sum() + trace_a + trace_b - 2 * common).item()


def evaluate(real: Images, generated: Tensor) -> Quality:
    """Compare `generated` [n, channels, size, size], made with the labels of `real`, with `real`; n is the same.

    Leaves torch's random state as it was. Needs at least two classes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(CLASSIFIER_SEED)
        classifier, held_out_accuracy = train_classifier(real)
        halves = extract(classifier, real.pixels)[torch.randperm(len(real.pixels))].tensor_split(2)
    return Quality(
        frechet=frechet_distance(extract(classifier, real.pixels), extract(classifier, generated)),
        frechet_of_real_halves=frechet_distance(*halves),
        label_agreement=accuracy(classifier, generated, real.labels),
        classifier_accuracy=held_out_accuracy,
    )
