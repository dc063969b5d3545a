"""Vectors for a weight that nothing is known about: power iterations until sigma stands still."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from bssn_fast import reference
from bssn_fast.calls.normalizer import Normalizer
from bssn_fast.laws import Law
from bssn_fast.layout import ONE, Stack, compute_dtype, fits_kernels, input_dimension, vector_sizes

_UNIT_TOLERANCE = 1e-4  # of what power iterations leave, 1e-6 is the most; averages of vectors are shorter
_UNIT_TOLERANCE_16_BITS = 4e-3  # rounding to bfloat16 changes a length by less

BELONGING = 0.9
"""Before the first use, and where weights have changed beside the vectors: what steps of training leave must pass.

Least of all layers over 120 steps of GANs whose discriminator has 7 convolutions, `sn` and `bssn`, torch's and DCGAN's
initialisation: 0.97 with Adam at 1e-4 and 2e-4; with others 0.94 after the tenth step, and before it 0.87 with Adam at
1e-3, 0.59 at 4e-3, 0.86 with SGD at 0.01, 0.004 at 0.1. Below 0.9 a step has made another weight.
"""

STILL_BELONGING = 0.98
"""Where only weights change, without any iteration: as long as that goes on, sigma stays right within a tenth.

Another singular value can outgrow the one that the vectors belong to. An iteration shows that late, as the vectors
stand still there. So sigma of small matrices, whose singular values lie far apart, is computed. In random walks it was
off by up to 28 % before, for 3 by 4; by iterations alone it is by 9 % for 16 by 64, and by 6 % for 64 by 256.
"""

_SMALL = 16  # a matrix with no more rows, or no more columns

_FIRST_ROUND = 8
_MOST_IN_A_ROUND = 1024
_STANDING_STILL = 0.002
_HINT = 10


@torch.no_grad()
def are_units(vectors: Sequence[Tensor]) -> list[bool]:
    """Whether vectors of one dtype have length 1, up to rounding in it; waits for the device once.

    Of n vectors in one tensor [n, size], whether all have.
    """
    if any(v.ndim > 1 for v in vectors):
        units = iter(are_units([row for v in vectors for row in (v if v.ndim > 1 else [v])]))
        return [all([next(units) for _ in range(len(v) if v.ndim > 1 else 1)]) for v in vectors]
    dtype = vectors[0].dtype
    rounded = compute_dtype(dtype) != dtype
    lengths = torch._foreach_norm([v.float() for v in vectors] if rounded else list(vectors))
    tolerance = _UNIT_TOLERANCE_16_BITS if rounded else _UNIT_TOLERANCE
    return [abs(length - 1) <= tolerance for length in torch.stack(lengths).tolist()]


def write(vectors: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Put new values into a layer's vectors."""
    for vector, new in zip(vectors, found, strict=True):
        with torch.no_grad(), torch.inference_mode(vector.is_inference()):
            vector.copy_(new)


@torch.no_grad()
def belong(
    weight: Tensor,
    vectors: Sequence[Tensor],
    dim: int,
    eps: float,
    *,
    at_least: float = BELONGING,
    stack: Stack = ONE,
) -> bool:
    """Whether unit vectors may be those of the weight's largest singular values; waits for the device.

    They are not if they give less than a part, `at_least`, of the sigma that a power iteration would, as where a
    weight is new. What a step of training, or slow convergence, leaves to be done is far less, and is left to the
    iterations to come. With STILL_BELONGING there are none to come, and of small matrices sigma itself is asked for.
    """
    if not vectors:
        return True

    def good(w: Tensor, *own: Tensor) -> Tensor:
        found = []
        for j in range(0, len(own), 2):  # the input side is the output side of the other dimension
            side, pair = (dim if j == 0 else input_dimension(dim)), own[j : j + 2]
            now = reference.spectral_norm(w, pair, side).abs()
            matrix = reference.unfold(w, side)
            if at_least >= STILL_BELONGING and min(matrix.shape) <= _SMALL:
                then = _exact_norm(matrix)
            else:
                then = reference.spectral_norm(w, reference.power_iteration(w, pair, side, eps), side).abs()
            found.append(~(now < at_least * then))  # true where a weight is not finite
        return torch.stack(found).all()

    w = weight.detach().to(compute_dtype(weight.dtype))
    return bool(good(w, *vectors) if stack == ONE else torch.vmap(good)(stack.numbered(w), *vectors).all())


@reference.without_autocast  # torch has no eigenvalues in 16 bits on GPUs
def _exact_norm(matrix: Tensor) -> Tensor:
    """Return the spectral norm [] of a matrix with few rows or few columns; 0 if it is not finite."""
    rows, columns = matrix.shape
    squared = matrix @ matrix.mH if rows <= columns else matrix.mH @ matrix
    squared = torch.where(squared.isfinite().all(), squared, 0)
    return torch.linalg.eigvalsh(squared)[-1].clamp_min(0).sqrt()


def random_direction(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a random unit vector [size] as torch draws its u and v: one normal_ on the weight's device.

    Or n at once, [n, size].
    """
    vector = torch.empty(shape, dtype=compute_dtype(weight.dtype), device=weight.device).normal_(0, 1)
    return torch.nn.functional.normalize(vector, dim=-1, eps=1e-12)


@torch.no_grad()
def estimate_vectors(
    weight: Tensor,
    dim: int,
    two_sided: bool,
    *,
    hints: Sequence[Tensor | None],
    eps: float,
    backend: str = "",
    stack: Stack = ONE,
) -> list[Tensor]:
    """Return u_out, v_out[, u_in, v_in] of a weight, in its compute dtype: sigma is right within about 0.2%.

    hints: where to start, in the same order, as far as known; of any length and dtype.
    """
    weight = weight.detach()
    starts = []
    for j, part in enumerate(stack.parts(weight)):
        own = hints if stack == ONE else [None if h is None or len(h) != stack.n else h[j] for h in hints]
        starts.append(start_vectors(part, dim, two_sided, own))
    vectors = stack.join_vectors(starts)
    if vectors:
        until_it_stands_still(_iterations(weight, dim, vectors, eps, backend, stack))
    return vectors


def start_vectors(weight: Tensor, dim: int, two_sided: bool, hints: Sequence[Tensor | None]) -> list[Tensor]:
    """Return vectors to begin with, in the weight's compute dtype: the hints and a random part.

    A hint may be orthogonal to what is looked for. The random part is the same everywhere; torch's generators are left
    alone.
    """
    dtype = compute_dtype(weight.dtype)
    generator = torch.Generator("cpu").manual_seed(0)
    random_dtype = torch.complex128 if weight.is_complex() else torch.float64
    vectors: list[Tensor] = []
    for size, hint in zip(vector_sizes(weight.shape, dim, two_sided), hints, strict=True):
        start = torch.randn(size, generator=generator, dtype=random_dtype, device="cpu")
        start /= torch.linalg.vector_norm(start)
        if hint is not None and hint.shape == start.shape:
            known = hint.detach().to("cpu", random_dtype)
            length = torch.linalg.vector_norm(known)
            if torch.isfinite(length) and length > 0:
                start += _HINT / length * known
                start /= torch.linalg.vector_norm(start)
        vectors.append(start.to(weight.device, dtype))
    return vectors


def until_it_stands_still(iterate: Callable[[int], Sequence[float]]) -> None:
    """Make power iterations until sigmas stand still: `iterate` makes so many and returns them.

    Each round does twice as many as the one before, until one brings none of them 0.2%. As the error falls at least as
    1/n on the spectra of random matrices, it is then no larger than that.
    """
    n, before = _FIRST_ROUND, iterate(_FIRST_ROUND)
    while n < _MOST_IN_A_ROUND and any(sigma > 0 for sigma in before):
        n *= 2
        now = iterate(n)
        if not any(s > old * (1 + _STANDING_STILL) for s, old in zip(now, before, strict=True)):  # also of no number
            break
        before = now


def _iterations(
    weight: Tensor, dim: int, vectors: list[Tensor], eps: float, backend: str, stack: Stack
) -> Callable[[int], Sequence[float]]:
    """Return what makes so many power iterations, in place, and returns the sigma of each matrix."""
    if fits_kernels(weight, dim):
        laws, stacks, two_sided = [Law()] * stack.n, [stack], [len(vectors) == 4]
        normalizer = Normalizer([weight], [dim], two_sided, laws=laws, eps=eps, backend=backend, stacks=stacks)
        return lambda n: cast(list[float], normalizer.compute([weight], vectors, n, weight.dtype).sigma.tolist())
    w = weight.to(vectors[0].dtype)

    def iterate(n: int) -> list[float]:
        for _ in range(n):
            each = stack.each(w, vectors)
            vectors[:] = stack.join_vectors([reference.power_iteration(m, own, dim, eps) for m, own in each])
        return [float(reference.spectral_norm(m, own, dim).abs()) for m, own in stack.each(w, vectors)]

    return iterate
