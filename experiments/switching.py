"""A training of others, switched: torch's parametrization and `sn`, step by step from the same start.

The network and schedule are those that torch-fidelity's SNGAN example trains on CIFAR10: seven convolutions and a
linear layer against a generator of transposed convolutions, hinge loss, Adam with rate 2e-4 and betas 0 and 0.9,
five steps of the discriminator for one of the generator, rates that fall to 0. Here the images are emoji.
"""

from __future__ import annotations

import copy
import time
from itertools import pairwise
from typing import Any

import torch
from gan import data
from gan.networks import PaperDiscriminator, normalize, weight_layers
from torch import Tensor, nn
from torch.nn.functional import relu
from tqdm import tqdm

import bssn_fast

NOISE = 128
CRITIC_STEPS = 5
RATE, BETAS = 2e-4, (0.0, 0.9)
WAYS = ("torch", "sn", "rounded")
"""torch's parametrization; the same model after `bssn_fast.apply`; torch's after a rounding error in each weight."""


def make_generator(width: int) -> nn.Sequential:
    """Return the generator: noise [n, NOISE, 1, 1] -> images [n, 3, 32, 32]."""
    widths = [8 * width, 4 * width, 2 * width, width]
    blocks: list[nn.Module] = [nn.ConvTranspose2d(NOISE, widths[0], 4)]
    for before, after in pairwise(widths):
        blocks += [nn.BatchNorm2d(before), nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1)]
    return nn.Sequential(*blocks, nn.BatchNorm2d(width), nn.ReLU(), nn.ConvTranspose2d(width, 3, 3, 1, 1), nn.Tanh())


class Training:
    """One of the trainings that are compared."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module, steps: int) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.adams = [torch.optim.Adam(model.parameters(), RATE, BETAS) for model in (generator, discriminator)]
        self.falls = [torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps) for adam in self.adams]

    def step(self, real: Tensor, seed: int) -> tuple[float, float]:
        """Train on images [n, 3, 32, 32] with noise of a seed; returns the losses of generator and discriminator."""
        torch.manual_seed(seed)
        adam_generator, adam_discriminator = self.adams
        noise = torch.randn(1 + CRITIC_STEPS, len(real), NOISE, 1, 1).to(real.dtype)
        self.discriminator.requires_grad_(False)
        loss_generator = -self.score(self.generator(noise[0])).mean()
        adam_generator.zero_grad()
        loss_generator.backward()
        adam_generator.step()
        self.discriminator.requires_grad_(True)
        for z in noise[1:]:
            with torch.no_grad():
                fake = self.generator(z)
            loss = relu(1 + self.score(fake)).mean() + relu(1 - self.score(real)).mean()
            adam_discriminator.zero_grad()
            loss.backward()
            adam_discriminator.step()
        for fall in self.falls:
            fall.step()
        return loss_generator.item(), loss.item()

    def score(self, images: Tensor) -> Tensor:
        return self.discriminator(images, images[:, 0, 0, 0].long())


def trainings(width: int, steps: int, dtype: torch.dtype = torch.float32) -> dict[str, Training]:
    """Return the WAYS from one start: `sn` takes over torch's vectors u and v, so that only the arithmetic differs."""
    torch.manual_seed(0)
    generator, discriminator = make_generator(width).to(dtype), PaperDiscriminator(3, 32, 1, width).to(dtype)
    normalize(discriminator, "torch-sn", 1.0)
    rounded = copy.deepcopy(discriminator)
    with torch.no_grad():
        for layer in weight_layers(rounded).values():
            original = layer.parametrizations.weight.original
            original.copy_(torch.nextafter(original, torch.full_like(original, torch.inf)))
    models = {"torch": discriminator, "sn": copy.deepcopy(discriminator), "rounded": rounded}
    bssn_fast.apply(models["sn"], "sn")
    return {way: Training(copy.deepcopy(generator), model, steps) for way, model in models.items()}


def rows(steps: int, width: int, batch: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Return by step the losses and the seconds of each of the WAYS, which take their steps in turns.

    A step trains the generator once and the discriminator CRITIC_STEPS times. Seconds are those of this thread.
    """
    images = data.load("emoji", 32, "").pixels.to(dtype)
    runs = trainings(width, steps, dtype)
    chosen = torch.Generator().manual_seed(0)
    found = []
    for step in tqdm(range(steps), desc=f"switching, {dtype}", unit="step"):
        real = images[torch.randint(len(images), (batch,), generator=chosen)]
        row: dict[str, Any] = {"precision": str(dtype)[6:], "width": width, "batch": batch, "step": step}
        for way, run in runs.items():
            started = time.thread_time()
            generator, discriminator = run.step(real, seed=step)
            row |= {f"generator_{way}": generator, f"discriminator_{way}": discriminator}
            row[f"seconds_{way}"] = time.thread_time() - started
        found.append(row)
    return found


def both(quick: bool) -> list[dict[str, Any]]:
    """Return the losses of narrow networks in two precisions, and then the seconds of the network in full."""
    if quick:
        return rows(2, 4, 4) + rows(2, 4, 4, torch.float64) + rows(2, 8, 4)
    return rows(50, 16, 16) + rows(15, 16, 16, torch.float64) + rows(12, 64, 4)
