"""How close generated images are to real ones, in the feature space of a small classifier of the real ones."""

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


NEIGHBOURS = 3
"""Of precision and recall, as in the paper that they come from."""


@dataclass(frozen=True)
class Quality:
    """How close generated images are to the real ones; all of it by a classifier of the same real images.

    So the figures compare runs on the same data with each other, not with any published FID or inception score.
    """

    frechet: float
    """Frechet distance of the features; infinite where a generated image is not finite."""
    frechet_of_real_halves: float
    """What two random halves of the real images are apart, to judge the other by; whole sets would be closer."""
    classifier_score: float
    """exp of the mean divergence of the images' class probabilities from their mean: the inception score's formula."""
    precision: float
    """Share of generated images within the real ones' neighbourhoods."""
    recall: float
    """Share of real images within the generated ones' neighbourhoods."""
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


@torch.no_grad()
def classifier_score(model: Classifier, pixels: Tensor) -> float:
    """Return exp(E KL(p(y|x) || p(y))), Salimans and others' inception score with this classifier: 1 to its classes."""
    logs = torch.cat([model(part).double().log_softmax(1) for part in pixels.split(512)])
    mean = logs.exp().mean(0)
    return ((logs.exp() * (logs - mean.log())).sum(1).mean()).exp().item()


def precision_recall(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """Return improved precision and recall (Kynkaanniemi and others, NeurIPS 2019) of features [n, d] and [m, d]."""

    def share_within(points: Tensor, centres: Tensor) -> float:
        radius = torch.cdist(centres, centres).kthvalue(NEIGHBOURS + 1, dim=1).values  # the first is the point itself
        return (torch.cdist(points, centres) <= radius).any(1).double().mean().item()

    return share_within(generated, real), share_within(real, generated)


class Judge:
    """A classifier of real images and their features. Leaves torch's random state as it was; needs two classes."""

    def __init__(self, real: Images) -> None:
        self.real = real
        with torch.random.fork_rng():
            torch.manual_seed(CLASSIFIER_SEED)
            self.classifier, self.classifier_accuracy = train_classifier(real)
            self.features = extract(self.classifier, real.pixels)
            halves = self.features[torch.randperm(len(real.pixels))].tensor_split(2)
        self.frechet_of_real_halves = frechet_distance(*halves)

    def frechet(self, generated: Tensor) -> float:
        """Return the Frechet distance of images [n, channels, size, size], infinite if one is not finite."""
        if not generated.isfinite().all():
            return float("inf")
        return frechet_distance(self.features, extract(self.classifier, generated))

    def quality(self, generated: Tensor) -> Quality:
        """Compare images [n, channels, size, size], made with the real ones' labels, with those; n is the same."""
        finite = bool(generated.isfinite().all())
        features = extract(self.classifier, generated) if finite else None
        precision, recall = (0.0, 0.0) if features is None else precision_recall(self.features, features)
        return Quality(
            frechet=self.frechet(generated),
            frechet_of_real_halves=self.frechet_of_real_halves,
            classifier_score=classifier_score(self.classifier, generated) if finite else 1.0,
            precision=precision,
            recall=recall,
            label_agreement=accuracy(self.classifier, generated, self.real.labels),
            classifier_accuracy=self.classifier_accuracy,
        )


def evaluate(real: Images, generated: Tensor) -> Quality:
    """Compare `generated` [n, channels, size, size], made with the labels of `real`, with `real`; n is the same.

    Leaves torch's random state as it was. Needs at least two classes.
    """
    return Judge(real).quality(generated)
