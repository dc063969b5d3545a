"""How the kernels address a weight, and how it is cut into tiles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import lcm
from typing import NamedTuple

from bssn_fast import layout

MAX_K = 2048
"""Kernel positions of a two-sided layer: one row of a tile holds at least one channel with all of them."""


class TileShape(NamedTuple):
    """What the kernels are specialised on: the elements that a program holds at a time, [rows, groups, positions].

    Where a row is one run of memory (flat), groups are the columns of the tile, and positions what its sum over
    kernel positions has room for.
    """

    vector: int
    flat: bool
    two_sided: bool
    rows: int
    groups: int
    positions: int


NUM_WARPS = 8
TILE_ELEMENTS = 4096
"""Sixteen per thread; half as many in fp64, and of those that are loaded one by one."""

TILE_ROWS = 4
"""The rows of a tile share the loads of v_out and u_in, and add up in registers before they reach a slot."""

MAX_TILE_ROWS = 64
"""Of short rows; with 128 of them registers would spill."""

MAX_ROWS_BYTES = 100 << 10
"""Of a tile's rows, which are read a second time: two programs on each of 132 multiprocessors have 26 MB in flight
then, which stay in the second-level cache. Longer rows come in pairs."""

COLUMNS = (32, 256)
"""Of a tile of short rows. More sizes would waste fewer lanes and take longer to compile."""

MAX_VECTOR_TWO_SIDED = 4
"""Vectors of eight 16-bit elements in two directions would spill registers."""

MAX_ROW_TILES = 64
"""Per layer. Each row tile leaves a slot as long as a row, so 64 rows or fewer cost a slot each, 1024 rows 1/16."""


MAX_PIECES = 8
"""Of TILE_ELEMENTS, or of half as many in fp64, that a program keeps in registers: half of what 256 threads have."""


class Geometry(NamedTuple):
    """A weight as vectors of `shape.vector` elements; strides count vectors (see fields.py).

    step: elements along a flat row that a tile takes at a time; whole channels, so that lanes keep their positions.
    blocks: how many times `shape.rows` rows a tile has; 0: as many as leave MAX_ROW_TILES tiles.
    """

    shape: TileShape
    c_out: int
    c_in: int
    k: int
    row_stride: int
    group_stride: int
    k_stride: int
    numel: int
    step: int = 0
    blocks: int = 0

    @property
    def row_size(self) -> int:
        return self.c_in * self.k

    @property
    def groups(self) -> int:
        return self.c_in // self.shape.vector

    @property
    def rows_per_tile(self) -> int:
        return (self.blocks or -(-self.c_out // (MAX_ROW_TILES * self.shape.rows))) * self.shape.rows

    @property
    def steps(self) -> int:
        return -(-self.row_size // self.step) if self.step else 0

    @property
    def slot_k(self) -> int:
        """Entries of a slot for each of u_in: flat tiles leave the sum over kernel positions to the column tiles."""
        return self.k if self.shape.flat else 1

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


def _positions(n: int) -> int:
    """Return room for n positions of a few sizes, so that few kernels are compiled."""
    room = max(power_of_two(n), 16)
    return 64 if room == 32 else room


def _flat_shape(
    c_out: int, row_size: int, k: int, two_sided: bool, itemsize: int, vector: int
) -> tuple[TileShape, int]:
    """Return the tile of a layer whose rows are runs of memory, and its step."""
    elements = TILE_ELEMENTS if itemsize <= 4 and vector > 1 else TILE_ELEMENTS // 2
    positions = _positions(k) if two_sided else 1
    rows = TILE_ROWS if TILE_ROWS * row_size * itemsize <= MAX_ROWS_BYTES else TILE_ROWS // 2
    if elements // rows < vector * 32 * NUM_WARPS:  # all threads have the same rows
        rows //= 2
    if c_out == 1:
        rows = 2 if two_sided else 1
    longest = max(elements // rows, positions)
    columns = min([n for n in COLUMNS if n >= max(row_size, positions)], default=longest)
    columns = min(columns, longest)
    rows = max(min(elements // columns, MAX_TILE_ROWS), 1)
    period = lcm(k, vector)
    if period > columns:  # one by one, then
        return _flat_shape(c_out, row_size, k, two_sided, itemsize, 1)
    step = min(row_size, columns // period * period)
    return TileShape(vector, True, two_sided, rows, columns, positions), step


def _strided_shape(k: int, two_sided: bool, itemsize: int, vector: int) -> TileShape:
    """Return the tile of a layer in any other order of memory."""
    positions = _positions(k * vector) if k > 1 else vector
    columns = 512 if two_sided else 1024  # Triton 3.6 spills otherwise
    rows = 2 if itemsize > 4 or vector == 1 or two_sided else TILE_ROWS
    if positions > columns:
        rows = 1
    return TileShape(vector, False, two_sided, rows, max(columns // positions, 1), positions)


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

    flat = k_stride == 1 and channel_stride == k
    vector = 16 // itemsize if aligned and (flat or channel_stride == 1) else 1
    vector = min(vector, MAX_VECTOR_TWO_SIDED) if two_sided else vector
    along = c_in * k if flat else c_in  # what vectors go along
    if along % vector or row_stride % vector or (k > 1 and not flat and k_stride % vector):
        vector = 1
    if flat:
        tile_shape, step = _flat_shape(c_out, c_in * k, k, two_sided, itemsize, vector)
        vector = tile_shape.vector
        return Geometry(tile_shape, c_out, c_in, k, row_stride // vector, 0, 0, numel, step)
    if k * vector > MAX_K:
        vector = 1
    tile_shape = _strided_shape(k, two_sided, itemsize, vector)
    group_stride = 1 if vector > 1 else channel_stride
    return Geometry(tile_shape, c_out, c_in, k, row_stride // vector, group_stride, k_stride // vector, numel)


def kept(geometries: Sequence[Geometry], programs: int) -> list[Geometry] | None:
    """Return the layers cut so that each of `programs` has one tile at most, which fits its registers, or None.

    Tiles have as few pieces as that allows, and then as few blocks, or the last programs would have nothing to do.
    Layers whose pieces are smaller than others' (a few rows that are not aligned) are read again instead: blocks is 0.
    """
    if any(not g.shape.flat or g.row_stride * g.shape.vector not in (0, g.row_size) for g in geometries):
        return None  # rows have to be runs of memory, one behind the other
    piece = max(g.shape.rows * g.shape.groups for g in geometries)
    held = [g.shape.rows * g.shape.groups == piece for g in geometries]
    for pieces in range(max(g.steps for g in geometries), MAX_PIECES + 1):
        for blocks in range(1, pieces + 1):
            most = [min(blocks, max(pieces // g.steps, 1), -(-g.c_out // g.shape.rows)) for g in geometries]
            found = [g._replace(blocks=n) if h else g for g, n, h in zip(geometries, most, held, strict=True)]
            if sum(g.row_tiles for g in found) <= programs:
                return found
    return None
