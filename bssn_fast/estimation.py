"""Vectors for a weight that nothing is known about: power iterations until sigma stands still."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bssn_fast.functional import Normalizer
from bssn_fast.layout import compute_dtype, vector_sizes

UNIT_TOLERANCE = 3e-3
"""A vector whose length is this far from 1 is none of ours. Rounding to bfloat16 changes lengths by less."""

_FIRST_ROUND = 8
_MOST_IN_A_ROUND = 1024
_STANDING_STILL = 0.002
_HINT = 10


def is_unit(vector: Tensor) -> bool:
    """Whether a vector has length 1, up to `UNIT_TOLERANCE`; waits for the device."""
    return abs(float(torch.linalg.vector_norm(vector.detach(), dtype=torch.float64)) - 1) <= UNIT_TOLERANCE


@torch.no_grad()
def estimate_vectors(
    weight: Tensor, dim: int, two_sided: bool, *, hints: Sequence[Tensor | None], eps: float, backend: str = ""
) -> list[Tensor]:
    """Return u_out, v_out[, u_in, v_in] of a weight, in its compute dtype: sigma is right within about 0.2%.

    Each round does twice as many power iterations as the one before, until one brings less than 0.2%. As the error
    falls at least as 1/n on the spectra of random matrices, it is then no larger than that.

    hints: where to start, in the same order, as far as known; of any length and dtype. A random part is added, as a
        hint may be orthogonal to what is looked for. It is the same everywhere; torch's generators are left alone.
    """
    weight = weight.detach()
    dtype = compute_dtype(weight.dtype)
    generator = torch.Generator().manual_seed(0)
    vectors = []
    for size, hint in zip(vector_sizes(weight.shape, dim, two_sided), hints, strict=True):
        start = torch.randn(size, generator=generator, dtype=torch.float64)
        start /= torch.linalg.vector_norm(start)
        if hint is not None and hint.shape == start.shape:
            known = hint.detach().to("cpu", torch.float64)
            length = torch.linalg.vector_norm(known)
            if torch.isfinite(length) and length > 0:
                start += _HINT / length * known
                start /= torch.linalg.vector_norm(start)
        vectors.append(start.to(weight.device, dtype))
    normalizer = Normalizer([weight], [dim], [two_sided], scale=1.0, eps=eps, backend=backend)
    n, before = _FIRST_ROUND, 0.0
    while n <= _MOST_IN_A_ROUND:
        sigma = float(normalizer.compute([weight], vectors, n, weight.dtype).sigma[0])
        if not sigma > before * (1 + _STANDING_STILL):  # also where it is not a number
            break
        n, before = 2 * n, sigma
    return vectors
