"""How the kernels address a weight, and how it is cut into tiles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from bssn_fast import layout

MAX_K = 2048
"""Kernel positions of a two-sided layer: one row of a tile holds at least one channel with all of them."""


class TileShape(NamedTuple):
    """What the kernels are specialised on: the elements that a program holds at a time, [rows, groups, positions]."""

    vector: int
    kernel_innermost: bool
    two_sided: bool
    rows: int
    groups: int
    positions: int


NUM_WARPS = 8
COLUMNS = 1024
"""Of a tile: one 16-byte load of fp32 per thread and row."""

MIN_COLUMNS = 32
"""A warp's width: of rows that are shorter than COLUMNS, a tile holds the more."""

TILE_ROWS = 4
"""The rows of a tile share the loads of v_out and u_in, and add up in registers before they reach a slot. `_tile_rows`
says where four would spill registers."""

MAX_VECTOR_TWO_SIDED = 4
"""As does a vector of eight 16-bit elements with four rows."""

MAX_ROW_TILES = 64
"""Per layer. Each row tile leaves a slot as long as a row, so 64 rows or fewer cost a slot each, 1024 rows 1/16."""


class Geometry(NamedTuple):
    """A weight as vectors of `shape.vector` elements; strides count vectors (see fields.py)."""

    shape: TileShape
    c_out: int
    c_in: int
    k: int
    row_stride: int
    group_stride: int
    k_stride: int
    numel: int

    @property
    def row_size(self) -> int:
        return self.c_in * self.k

    @property
    def groups(self) -> int:
        return self.c_in // self.shape.vector

    @property
    def rows_per_tile(self) -> int:
        return -(-self.c_out // (MAX_ROW_TILES * self.shape.rows)) * self.shape.rows

    @property
    def row_tiles(self) -> int:
        return -(-self.c_out // self.rows_per_tile)


def power_of_two(n: int) -> int:
    """Return the smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def _kernel_stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return the one stride that walks all kernel positions in order, or None if there is no such stride."""
    dims = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    for (_, outer), (size, inner) in pairwise(dims):
        if outer != size * inner:
            return None
    return dims[-1][1] if dims else 1


def _tile_rows(
    c_out: int, vector: int, kernel_innermost: bool, two_sided: bool, positions: int, itemsize: int, columns: int
) -> int:
    if c_out == 1 or positions > columns:
        return 1
    two_sided_fits = itemsize == 4 and kernel_innermost and 64 <= positions <= 128
    return 2 if itemsize > 4 or vector == 1 or (two_sided and not two_sided_fits) else TILE_ROWS


def geometry(
    shape: Sequence[int],
    strides: Sequence[int],
    dim: int,
    two_sided: bool,
    itemsize: int,
    aligned: bool,
) -> Geometry | None:
    """Return how to address a weight, or None if the kernels cannot.

    `aligned`: the weight and everything that is read or written beside it start at multiples of 16 bytes.
    """
    c_out, c_in, k = layout.channels(shape, dim)
    k_stride = _kernel_stride(shape[2:], strides[2:])
    if k_stride is None or c_out * c_in * k == 0 or c_out * c_in * k >= 2**31:
        return None
    numel = c_out * c_in * k
    row_stride = strides[dim] if c_out > 1 else 0
    channel_stride = strides[1 - dim] if c_in > 1 else k * k_stride
    if not two_sided and channel_stride == k * k_stride:  # the row is one run: treat each element as a channel
        c_in, k, channel_stride, k_stride = c_in * k, 1, k_stride, 1
    if k > MAX_K:
        return None

    kernel_innermost = k_stride == 1 and channel_stride == k
    vector = 16 // itemsize if aligned and (kernel_innermost or channel_stride == 1) else 1
    vector = min(vector, MAX_VECTOR_TWO_SIDED) if two_sided else vector
    while vector > 1 and (
        c_in % vector or row_stride % vector or (k > 1 and not kernel_innermost and k_stride % vector)
    ):
        vector //= 2
    if k * vector > MAX_K:
        vector = 1
    positions = power_of_two(k * vector)
    columns = COLUMNS // 2 if two_sided and not kernel_innermost else COLUMNS  # Triton 3.6 spills otherwise
    rows = _tile_rows(c_out, vector, kernel_innermost, two_sided, positions, itemsize, columns)
    groups = max(columns // positions, 1)
    while groups * positions > MIN_COLUMNS and groups >= 2 * (c_in // vector) and rows < c_out:
        groups, rows = groups // 2, rows * 2  # a short row leaves room for others
    tile_shape = TileShape(vector, kernel_innermost, two_sided, rows, groups, positions)
    group_stride = k if kernel_innermost else 1 if vector > 1 else channel_stride
    return Geometry(tile_shape, c_out, c_in, k, row_stride // vector, group_stride, k_stride // vector, numel)
