"""Geometry of the weights: sizes of the two unfoldings and of the vectors that belong to them.

A weight is read as W[o, i, k]: output channel, input channel, kernel position. `dim` says which stored dimension is
the output: 0 for convolutions, linear and embedding layers, 1 for transposed convolutions. The input channel is the
other one of dimensions 0 and 1; all further dimensions are kernel positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch

VECTOR_ALIGNMENT = 4
"""Every vector of a snapshot starts at a multiple of this many elements: 16 bytes in fp32."""


def channels(shape: Sequence[int], dim: int) -> tuple[int, int, int]:
    """Return (c_out, c_in, k) of a weight's shape, k being the product of the kernel sizes."""
    return shape[dim], shape[1 - dim], prod(shape[2:])


def vector_sizes(shape: Sequence[int], dim: int, two_sided: bool) -> tuple[int, ...]:
    """Return the lengths of (u_out, v_out) or, for two directions, of (u_out, v_out, u_in, v_in)."""
    c_out, c_in, k = channels(shape, dim)
    out_side = (c_out, c_in * k)
    return (*out_side, c_in, c_out * k) if two_sided else out_side


def needs_two_sides(shape: Sequence[int]) -> bool:
    """Whether the two unfoldings differ: they are transposes of each other when k = 1."""
    return prod(shape[2:]) != 1


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of vectors, sigma and arithmetic for a weight's dtype: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=256)
def snapshot_offsets(
    shapes: tuple[tuple[int, ...], ...], dims: tuple[int, ...], two_sided: tuple[bool, ...]
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Return where each layer's vectors start in a snapshot (in elements), and the snapshot's length."""
    offsets, end = [], 0
    for shape, dim, both in zip(shapes, dims, two_sided, strict=True):
        starts = []
        for size in vector_sizes(shape, dim, both):
            starts.append(end)
            end += -(-size // VECTOR_ALIGNMENT) * VECTOR_ALIGNMENT
        offsets.append(tuple(starts))
    return tuple(offsets), end
