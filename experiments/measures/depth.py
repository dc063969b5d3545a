"""Gradients at initialisation against depth: what each normalisation and scale makes of them before any training."""

from __future__ import annotations

from typing import Any

import torch
from gan import data
from gan.networks import NETWORKS, normalize
from torch import nn
from tqdm import tqdm

from experiments.plan import DEPTHS, NO_NORM, SQRT2, VARIANTS, Case

SCALES = (0.3, 0.5, 0.7, 1.0, SQRT2, 2.0, 2.8, 4.0)
IMAGES = 32
SETTLING = 20
"""Power iterations after the first, so that sigma is that of the weights."""


def cases() -> list[Case]:
    """Return no normalisation, SN and BSN, and SSN and BSSN at all SCALES but 1."""
    scaled = [Case(norm, c) for norm in ("ssn", "bssn") for c in SCALES if c != 1]
    return [Case(NO_NORM), *(Case(norm) for norm in VARIANTS if norm in ("sn", "bsn")), *scaled]


def slope(model: nn.Module, images: torch.Tensor) -> float:
    """Return the mean length of dD/dx at images [n, c, h, w], in evaluation: no vector changes."""
    model.eval()
    x = images.clone().requires_grad_()
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(model(x, labels).sum(), x)
    model.train()
    return gradient.flatten(1).norm(dim=1).mean().item()


def rows(seeds: int, width: int, size: int = 32) -> list[dict[str, Any]]:
    """Return |dD/dx| of the paper's discriminator at three depths, by normalisation, scale and seed."""
    images = data.load("emoji", size, "").pixels
    found = []
    for network, layers in tqdm(DEPTHS.items(), desc="initial gradients", unit="depth"):
        for seed in range(seeds):
            for case in cases():
                torch.manual_seed(seed)
                model = NETWORKS[network][1](3, size, 1, width)
                normalize(model, case.norm, case.scale or 1.0)
                x = images[torch.randint(len(images), (IMAGES,))]
                with torch.no_grad():
                    for _ in range(SETTLING):
                        model(x[:1], x[:1, 0, 0, 0].long())
                scale = 1.0 if case.scale is None else case.scale
                found.append(
                    {"layers": layers, **case._asdict(), "scale": scale, "seed": seed, "slope": slope(model, x)}
                )
    return found
