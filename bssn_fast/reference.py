"""The definition: bidirectional scaled spectral normalisation of one weight in plain torch, for any dtype and device.

Every backend is tested against this file in float64. W[o, i, k] is the weight with its output channel o, input
channel i and kernel position k; the output side unfolds it to c_out x (c_in k), the input side to c_in x (c_out k).
A weight of one dimension has one direction and no vectors: its spectral norm is its length, as in torch.

Source: Lin, Sekar, Fanti, "Why Spectral Normalization Stabilizes GANs: Analysis and Improvements", NeurIPS 2021,
sections 4 and 5; the order of the output side's updates is that of torch.nn.utils.parametrizations.spectral_norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from bssn_fast.layout import compute_dtype, input_dimension

Vectors = tuple[Tensor, ...]
"""(u_out, v_out) of one direction, or (u_out, v_out, u_in, v_in) of both."""


P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Let matrix products keep their operands' precision where autocast is on."""

    @wraps(function)
    def full_precision(weight: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        if weight.is_meta:  # for which torch.autocast raises
            return function(weight, *args, **kwargs)
        with torch.autocast(weight.device.type, enabled=False):
            return function(weight, *args, **kwargs)

    return full_precision


def unfold(weight: Tensor, dim: int) -> Tensor:
    """Return the matrix with dimension `dim` as its rows, and all others, in order, as its columns."""
    return weight.movedim(dim, 0).flatten(1)


LONGEST_SUM = 2**12
"""Longer sums are taken in parts: what one running sum in fp32 of millions of numbers gives is far off."""


def product(matrix: Tensor, x: Tensor) -> Tensor:
    """Return matrix @ x, of a matrix or a vector with a vector."""
    if len(x) <= LONGEST_SUM:
        return matrix @ x
    parts = [m @ part for m, part in zip(matrix.split(LONGEST_SUM, -1), x.split(LONGEST_SUM), strict=True)]
    return torch.stack(parts).sum(0)


def norm(x: Tensor) -> Tensor:
    """Return |x|, of a vector."""
    if len(x) <= LONGEST_SUM:
        return torch.linalg.vector_norm(x)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in x.split(LONGEST_SUM)]))


def unit(x: Tensor, eps: float) -> Tensor:
    """Return x / max(|x|, eps)."""
    return x / norm(x).clamp_min(eps)


def usable(*vectors: Tensor) -> Tensor:
    """Whether all vectors are finite and none is zero, as a boolean scalar tensor."""
    norms = torch.stack([norm(x) for x in vectors])
    return (torch.isfinite(norms) & (norms > 0)).all()


@without_autocast
def power_iteration(weight: Tensor, vectors: Vectors, dim: int, eps: float) -> Vectors:
    """Return the vectors after one power iteration; those of a zero or non-finite weight stay as they were."""
    matrix = unfold(weight, dim)
    u_out = unit(product(matrix, vectors[1]), eps)
    v_out = unit(product(matrix.mH, u_out), eps)
    new = [torch.where(usable(u_out, v_out), x, old) for x, old in zip((u_out, v_out), vectors, strict=False)]
    if len(vectors) == 4:
        matrix = unfold(weight, input_dimension(dim))
        v_in = unit(product(matrix.mH, vectors[2]), eps)
        u_in = unit(product(matrix, v_in), eps)
        new += [torch.where(usable(u_in, v_in), x, old) for x, old in zip((u_in, v_in), vectors[2:], strict=True)]
    return tuple(new)


@without_autocast
def spectral_norm(weight: Tensor, vectors: Vectors, dim: int) -> Tensor:
    """Return sigma = u W v of one direction, or the mean of both; NaN for a weight that is not finite.

    Of a complex weight it is complex, u being conjugated; at the singular vectors it is real.
    """
    if weight.ndim == 1:
        sigma = norm(weight)
    else:
        sigma = product(product(unfold(weight, dim).transpose(0, 1), vectors[0].conj()), vectors[1])
    if len(vectors) == 4:
        in_side = unfold(weight, input_dimension(dim))
        sigma = (sigma + product(product(in_side.transpose(0, 1), vectors[2].conj()), vectors[3])) / 2
    return torch.where(torch.isfinite(sigma), sigma, torch.nan)


def unscaled(sigma: Tensor, scale: float | Tensor, at_most: bool) -> Tensor:
    """Whether sigma has no part in the multiplier: where a bound is slack, and of zero weights."""
    return sigma.real <= scale if at_most else sigma == 0


def multiplier(sigma: Tensor, scale: float | Tensor, at_most: bool = False) -> Tensor:
    """Return g(sigma) of a weight's law (laws.py): scale / sigma or, `at_most` that much, min(1, scale / sigma).

    scale: c, or the tensor [1] of a gain. Where sigma is 0, scale / sigma is 0: a zero weight stays zero.
    """
    if isinstance(scale, Tensor):
        scale = scale.reshape(sigma.shape)
    fixed = unscaled(sigma, scale, at_most)
    return torch.where(fixed, int(at_most), scale / torch.where(fixed, 1, sigma))  # whose derivatives are finite


def normalize(
    weight: Tensor,
    vectors: Vectors,
    dim: int,
    *,
    scale: float | Tensor,
    eps: float,
    n_power_iterations: int,
    at_most: bool = False,
) -> tuple[Tensor, Vectors, Tensor]:
    """Return (normalised weight, updated vectors, sigma); zero iterations use the given vectors (evaluation).

    scale, at_most: the law; see `multiplier`.
    """
    w = weight.to(compute_dtype(weight.dtype))
    for _ in range(n_power_iterations if vectors else 0):
        # u and v are constants, also in forward mode, which no_grad would let pass
        vectors = power_iteration(w.detach(), vectors, dim, eps)
    sigma = spectral_norm(w, vectors, dim)
    length = sigma if weight.ndim > 1 else sigma.clamp_min(eps)
    factor = multiplier(length, scale, at_most)
    return (w * factor).to(weight.dtype), vectors, sigma


def gradient_of_sigma(vectors: Vectors, shape: Sequence[int], dim: int) -> Tensor:
    """Return S = d sigma / d W in the weight's own shape."""

    def outer(u: Tensor, v: Tensor, d: int) -> Tensor:
        rows_first = [shape[d], *shape[:d], *shape[d + 1 :]]
        return torch.outer(u, v).view(rows_first).movedim(0, d)

    out_side = outer(vectors[0], vectors[1], dim)
    return out_side if len(vectors) == 2 else (out_side + outer(vectors[2], vectors[3], input_dimension(dim))) / 2


def normalize_backward(
    grad: Tensor,
    weight: Tensor,
    vectors: Vectors,
    sigma: Tensor,
    dim: int,
    scale: float | Tensor,
    at_most: bool = False,
) -> Tensor:
    """Return dL/dW from grad = dL/d(normalised weight), with u and v held constant as in torch.

    With S = d sigma / dW it is g G + g' <G, W> S, and g' is -g / sigma, or 0 where a bound is slack.
    """
    w, g = weight.to(compute_dtype(weight.dtype)), grad.to(compute_dtype(weight.dtype))
    direction = gradient_of_sigma(vectors, weight.shape, dim)
    return gradient(g, (g * w).sum(), direction, sigma, scale, at_most).to(weight.dtype)


def gradient(
    grad: Tensor, inner: Tensor, direction: Tensor, sigma: Tensor, scale: float | Tensor, at_most: bool = False
) -> Tensor:
    """Return dL/dW from grad, inner = <grad, W> and direction = d sigma / d W."""
    fixed = unscaled(sigma, scale, at_most)
    ratio = torch.where(fixed, 0, inner / torch.where(fixed, 1, sigma))
    return multiplier(sigma, scale, at_most) * (grad - ratio * direction)


def gain_backward(grad: Tensor, weight: Tensor, sigma: Tensor) -> Tensor:
    """Return dL/dgamma = <G, W> / sigma [1] of a gain; 0 where sigma is."""
    w, g = weight.to(compute_dtype(weight.dtype)), grad.to(compute_dtype(weight.dtype))
    return torch.where(sigma == 0, 0, (g * w).sum() / torch.where(sigma == 0, 1, sigma)).reshape(1)
