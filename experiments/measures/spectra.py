"""Claims about weights without training: variances at initialisation, kernels against convolution operators."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from gan import data
from gan.networks import PaperDiscriminator, normalize, weight_layers
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.work import layer_sets
from benchmarks.work.layer_sets import Layer
from bssn_fast.diagnostics import initial_variances
from bssn_fast.layout import channels
from experiments.files import write_whole


def largest_singular_value(blocks: Tensor) -> float:
    """Return the largest singular value of a block-diagonal matrix, given as blocks [n, rows, columns].

    It is the root of the largest eigenvalue of the smaller product of a block with its adjoint. Squaring costs only the
    small singular values their digits.
    """
    if blocks.shape[1] > blocks.shape[2]:
        blocks = blocks.mT
    # one by one, as all products together take as much memory as the blocks
    return max(torch.linalg.eigvalsh(block @ block.mH)[-1].item() for block in blocks) ** 0.5


def reshaped_norms(weight: Tensor, dim: int) -> tuple[float, float]:
    """Return (s_out, s_in): the spectral norms of the two unfoldings of a weight."""
    w = weight.transpose(0, dim)
    s_out = largest_singular_value(w.flatten(1)[None])
    return s_out, s_out if w[0, 0].numel() == 1 else largest_singular_value(w.transpose(0, 1).flatten(1)[None])


def operator_norm(weight: Tensor, dim: int, groups: int = 1, grid: int = 16) -> float:
    """Return the norm of the circular convolution, stride 1, of a weight on a grid at least as large as its kernel.

    The Fourier transform makes a circular convolution one matrix [c_out, c_in] per frequency (Sedghi, Gupta and Long,
    ICLR 2019); of the conjugate pairs one is taken. A stride only leaves rows out, so that its norm is at most this.
    """
    kernel = weight.shape[2:]
    blocks = weight.unflatten(0, (groups, -1)).flatten(0, 0)  # [groups, rows, columns, *kernel]
    if kernel:
        dims = tuple(range(3, 3 + len(kernel)))
        blocks = torch.fft.rfftn(blocks, s=(grid,) * len(kernel), dim=dims)
        blocks = blocks.flatten(3).permute(0, 3, 1, 2).flatten(0, 1)
    return largest_singular_value(blocks.mT if dim == 1 else blocks)


def grid_for(layer: Layer) -> int:
    """Return the grid's side: 64 for one dimension, else 16 up to 512 channels and 8 above."""
    if len(layer.shape) == 3:
        return 64
    return 16 if max(layer.shape[:2]) <= 512 else 8


def layer_rows(sets: dict[str, layer_sets.LayerSet], folder: Path) -> list[dict[str, Any]]:
    """Return one row per set and distinct layer with a Gaussian weight of variance 1; `folder` keeps what is done."""
    distinct = Counter((name, layer) for name, layer_set in sets.items() for layer in layer_set.layers)
    rows = []
    for (name, layer), count in tqdm(distinct.items(), desc="layers", unit="layer"):
        file = folder / f"{layer.kind}-{'x'.join(map(str, layer.shape))}-{layer.groups}.json"
        if not file.exists():
            write_whole(file, json.dumps(_layer_row(layer)))
        rows.append({"set": name, "count": count, **json.loads(file.read_text())})
    return rows


def _layer_row(layer: Layer) -> dict[str, Any]:
    seed = zlib.crc32(repr(layer).encode())
    weight = torch.randn(layer.shape, generator=torch.Generator().manual_seed(seed))
    c_out, c_in, k = channels(layer.shape, layer.dim)
    s_out, s_in = reshaped_norms(weight, layer.dim)
    grid = grid_for(layer) if layer.kind in ("conv", "convT") and k > 1 else 0
    operator = operator_norm(weight, layer.dim, layer.groups, grid) if grid else None
    variance = weight.double().var(correction=0).item()
    initial = initial_variances(layer.shape, layer.dim)
    two = k > 1
    return {
        "kind": layer.kind,
        "shape": "x".join(map(str, layer.shape)),
        "groups": layer.groups,
        "s_out": s_out,
        "s_in": s_in,
        "operator": operator,
        "grid": grid,
        "bound": sqrt(k) * min(s_out, s_in),
        "var_sn": variance / s_out**2,
        "var_sn_closed": 1 / (sqrt(c_out) + sqrt(c_in * k)) ** 2,
        "lecun": initial.lecun,
        "var_bsn": variance / ((s_out + s_in) / 2) ** 2,
        "var_bsn_closed": 4 / ((sqrt(c_in) + sqrt(c_out)) * (sqrt(k) + 1)) ** 2 if two else None,
        "xavier": initial.xavier,
    }


def slopes(seeds: int, size: int = 32, width: int = 64) -> list[dict[str, Any]]:
    """Return the mean length of dD/dx at initialisation of the paper's CNN, by normalisation and seed.

    "strict" divides each layer by the norm of its operator; images are emoji.
    """
    images = data.load("emoji", size, "").pixels
    rows = []
    for seed in tqdm(range(seeds), desc="slopes", unit="seed"):
        for norm in ("strict", "sn", "bsn", "ssn", "bssn", "none"):
            torch.manual_seed(seed)
            model = PaperDiscriminator(3, size, 1, width)
            if norm == "strict":
                _normalize_strictly(model, size)
            else:
                normalize(model, norm, sqrt(2))
            x = images[torch.randint(len(images), (16,))].clone().requires_grad_()
            model.eval()
            (gradient,) = torch.autograd.grad(model(x, x[:, 0, 0, 0].long()).sum(), x)
            rows.append({"norm": norm, "seed": seed, "slope": gradient.flatten(1).norm(dim=1).mean().item()})
    return rows


@torch.no_grad()
def _normalize_strictly(model: nn.Module, size: int) -> None:
    for layer in weight_layers(model).values():
        weight = layer.weight
        if isinstance(layer, nn.Conv2d):
            weight /= operator_norm(weight, 0, grid=grid_for(Layer("conv", tuple(weight.shape))))
        else:
            weight /= weight.norm()
