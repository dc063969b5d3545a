"""The reference as a backend: any device, one layer after another, plain torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from bssn_fast import reference
from bssn_fast.laws import GAIN, Laws
from bssn_fast.layout import Batch

DEVICES: tuple[str, ...] = ()


def why_unavailable(device: torch.device) -> str | None:
    return None


@torch.no_grad()
def forward(
    batch: Batch,
    weights: list[Tensor],
    vectors: list[Tensor],
    laws: Laws,
    eps: float,
    n_power_iterations: int,
    normalized: list[Tensor],
    snapshot: Tensor,
    sigma: Tensor,
) -> None:
    rest = iter(vectors)
    snapshots = batch.snapshot_views(snapshot)
    layers = zip(weights, batch.dims, batch.two_sided, laws.each(), strict=True)
    for j, (weight, dim, both, (scale, at_most)) in enumerate(layers):
        stored = tuple(next(rest) for _ in range(4 if both else 2))
        result, new, sigma_j = reference.normalize(
            weight, stored, dim, scale=scale, at_most=at_most, eps=eps, n_power_iterations=n_power_iterations
        )
        if normalized:
            normalized[j].copy_(result)
        sigma[j].copy_(sigma_j)
        for persistent, kept, x in zip(stored, snapshots[j], new, strict=True):
            persistent.copy_(x)
            kept.copy_(x)


@torch.no_grad()
def backward(
    batch: Batch,
    grads: list[Tensor],
    weights: list[Tensor],
    layers: list[int],
    laws: Laws,
    snapshot: Tensor,
    sigma: Tensor,
    grad_weights: list[Tensor],
    grad_gains: Tensor | None,
) -> None:
    snapshots = batch.snapshot_views(snapshot)
    each, gains = laws.each(), iter(() if grad_gains is None else grad_gains)
    for grad, grad_weight, j in zip(grads, grad_weights, layers, strict=True):
        w, sigma_j = weights[j], sigma[j]
        grad_weight.copy_(reference.normalize_backward(grad, w, snapshots[j], sigma_j, batch.dims[j], *each[j]))
        if laws.kinds[j] == GAIN:
            next(gains).copy_(reference.gain_backward(grad, w, sigma_j)[0])
