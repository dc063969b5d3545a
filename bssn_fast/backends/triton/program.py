"""Programs: the table for a set of layers, and the launches that run it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from bssn_fast.backends.triton import fields as f
from bssn_fast.backends.triton.geometry import Geometry, power_of_two
from bssn_fast.backends.triton.order import Stage, Tiles, by_stage, count, layer_by_layer
from bssn_fast.laws import bits

MAX_FLAT_STEPS = 16
ROWS_PASSES = 3  # a tile of rows takes three times as long as reading these rows once does (measured on an H100)
FLAT_TILES = 256  # of a layer in the forward pass; its tiles have up to MAX_FLAT_STEPS blocks
INNER_TILES = 128  # of a layer in the backward pass, where every gradient tile adds up all of their partial sums


class Layer(NamedTuple):
    """A layer of a call: its position there, geometry, addresses, places in the snapshot, and its law.

    law: its kind, its number, the address of its gain, if it has one, and the index of the gain's gradient.
    output: how many bytes its output is from that of the call's first layer.
    """

    position: int
    geometry: Geometry
    weight: int
    output: int
    vectors: tuple[int, ...]
    snapshot: tuple[int, ...]
    law: tuple[int, float, int, int]


Shapes = tuple[tuple[int, ...], ...]


class Program(NamedTuple):
    """The table's content, the sizes of the buffers it points into, and the launches: (arguments, programs).

    arguments: the first tile, or those of `registers_kernel`. That is what `kept` says: rows stay in registers. Then
    shapes are (..., blocks, steps), and loose_shapes those of tiles that do not stay.
    """

    values: list[int]
    n_segments: int
    launches: list[tuple[tuple[int, ...], int]]
    kept: bool
    shapes: Shapes
    loose_shapes: Shapes
    scratch_size: int
    stats_size: int
    counters_size: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _flat_steps(numel: int, backward: bool) -> int:
    steps = ceil_div(numel, f.FLAT_BLOCK.value * (INNER_TILES if backward else FLAT_TILES))
    return steps if backward else min(steps, MAX_FLAT_STEPS)


def in_entries(geometry: Geometry) -> int:
    """Return how many entries of r a column tile has: its lanes go through the slots' entries, SLOT_K for each."""
    if geometry.slot_k == 1:
        return f.COLUMN_BLOCK.value
    return max(min(f.IN_BLOCK.value, f.COLUMN_BLOCK.value // geometry.slot_k), 1)


def stages(geometry: Geometry, *, iterate: bool, write: bool) -> list[Stage]:
    """Return a layer's stages in the forward pass; `write`: the last power iteration, or an evaluation."""
    g = geometry
    columns = ceil_div(g.row_size, f.COLUMN_BLOCK.value)
    columns += ceil_div(g.c_in, in_entries(g)) if g.shape.two_sided else 0
    longest = max(g.row_size, g.c_out * g.k if g.shape.two_sided else g.c_out)
    block = f.VECTOR_BLOCK.value
    last = [Tiles(f.VECTORS.value, ceil_div(longest, block), 2 * block)]
    if write:
        flat = f.FLAT_BLOCK.value * _flat_steps(g.numel, backward=False)
        last.append(Tiles(f.SCALING.value, ceil_div(g.numel, flat), 2 * flat))
    elements = g.rows_per_tile * g.row_size
    return [
        [Tiles(f.ROWS.value, g.row_tiles, ROWS_PASSES * elements if iterate else elements)],
        [Tiles(f.COLUMNS.value, 1 + columns if iterate else 1, f.COLUMN_BLOCK.value * g.row_tiles)],
        last,
    ]


def backward_stages(geometry: Geometry) -> list[Stage]:
    """Return a layer's stages in the backward pass."""
    g = geometry
    flat = f.FLAT_BLOCK.value * _flat_steps(g.numel, backward=True)
    return [
        [Tiles(f.INNER.value, ceil_div(g.numel, flat), 2 * flat)],
        [Tiles(f.GRADIENT.value, g.row_tiles, 2 * g.rows_per_tile * g.row_size)],
    ]


class _Offsets:
    """Hands out places in a buffer, 16-byte aligned."""

    def __init__(self) -> None:
        self.end = 0

    def take(self, size: int) -> int:
        start = self.end
        self.end += ceil_div(size, 4) * 4
        return start


def _row(layer: Layer, scratch: _Offsets, stats: _Offsets, backward: bool) -> list[int]:
    g = layer.geometry
    two = g.shape.two_sided
    sizes = (g.c_out, g.row_size, g.c_in, g.c_out * g.k) if two else (g.c_out, g.row_size, 0, 0)
    flat = f.FLAT_BLOCK.value * _flat_steps(g.numel, backward)
    out_columns = ceil_div(sizes[1], f.COLUMN_BLOCK.value)
    in_columns = ceil_div(sizes[2], in_entries(g))
    n_stats = ceil_div(g.numel, flat) if backward else 4 + out_columns + in_columns

    row = [0] * f.LAYER_FIELDS.value
    kind, number, gain, grad_gain = layer.law
    for name, value in (
        (f.WEIGHT, layer.weight),
        (f.TWO_SIDED, int(two)),
        (f.C_OUT, g.c_out),
        (f.GROUPS, g.groups),
        (f.K, g.k),
        (f.ROW_STRIDE, g.row_stride),
        (f.GROUP_STRIDE, g.group_stride),
        (f.K_STRIDE, g.k_stride),
        (f.NUMEL, g.numel),
        (f.ROWS_PER_TILE, g.rows_per_tile),
        (f.FLAT_STEPS, _flat_steps(g.numel, backward)),
        (f.FLAT_BLOCKS, ceil_div(g.numel, f.FLAT_BLOCK.value)),
        (f.N_ROW_TILES, g.row_tiles),
        (f.N_FLAT_TILES, ceil_div(g.numel, flat)),
        (f.N_OUT_COLUMN_TILES, out_columns),
        (f.N_IN_COLUMN_TILES, in_columns),
        (f.STATS, stats.take(n_stats)),
        (f.INDEX, layer.position),
        (f.OUTPUT, layer.output),
        (f.STEP, g.step // g.shape.vector),
        (f.STEPS, g.steps),
        (f.SLOT_K, g.slot_k),
        (f.IN_ENTRIES, in_entries(g)),
        (f.LAW, kind),
        (f.NUMBER, bits(number) >> 32),
        (f.GAIN_ADDRESS, gain),
        (f.GRAD_GAIN, grad_gain),
    ):
        row[name.value] = value
    row[f.NUMBER.value + 1] = bits(number) & 0xFFFFFFFF
    if not backward:
        at_a_time = g.row_tiles * g.shape.rows * max(g.blocks, 1)
        folded = at_a_time * g.shape.groups if g.shape.flat else g.c_out * g.k * g.shape.vector
        row[f.FOLD.value] = scratch.take(folded if two else 0)
        row[f.SLOTS.value] = scratch.take(g.row_tiles * (sizes[1] + sizes[2] * g.slot_k))
        row[f.CHANNEL_SUMS.value] = scratch.take(sizes[2] * g.slot_k)
    for n, address in enumerate(layer.vectors):
        row[f.STORED.value + n] = address
    for n, start in enumerate(layer.snapshot):
        row[f.SNAPSHOT.value + n] = start
    for n, size in enumerate(sizes):
        row[f.SIZE.value + n] = size
        row[f.SOURCE.value + n] = 0 if backward else scratch.take(size)
    return row


def _shapes(layers: Sequence[Layer], rows: list[list[int]], backward: bool, kept: bool) -> tuple[Shapes, Shapes]:
    """Return the shapes of tiles that a kernel is compiled for, and those of tiles whose rows do not stay in registers.

    Writes to the rows of the table which of them is a layer's. What makes no difference is left out, so that fewer are
    compiled.
    """
    loose = [x.geometry.shape for x in layers]
    if backward:
        loose = [shape._replace(positions=1) if shape.flat else shape for shape in loose]
    loose_shapes = sorted(set(loose))
    for row, shape in zip(rows, loose, strict=True):
        row[f.SHAPE.value] = row[f.LOOSE_SHAPE.value] = loose_shapes.index(shape)
    if not kept:
        return tuple(map(tuple, loose_shapes)), ()
    held = [(*x.geometry.shape, x.geometry.blocks, x.geometry.steps) for x in layers]
    held_shapes = sorted({shape for x, shape in zip(layers, held, strict=True) if x.geometry.blocks})
    for row, own in zip(rows, held, strict=True):
        row[f.SHAPE.value] = held_shapes.index(own) if own in held_shapes else len(held_shapes)
    return tuple(held_shapes), tuple(map(tuple, loose_shapes))


def build(
    layers: Sequence[Layer],
    all_stages: Sequence[Sequence[Stage]],
    *,
    single: bool,
    backward: bool,
    programs: int,
    kept: bool = False,
) -> Program:
    """Return the program that runs `all_stages` (per layer) of `layers`; `programs` run at a time.

    kept: rows stay in registers, as their geometries have it, in a single launch of `programs`.
    """
    n_stages = len(all_stages[0])
    segments: list[list[int]] = []
    bounds = [0] * (n_stages + 1)
    tile = 0
    for stage, layer in layer_by_layer(all_stages, programs) if single and not kept else by_stage(all_stages):
        counter = f.FIRST_COUNTER.value + n_stages * layer + stage
        awaited = count(all_stages[layer][stage - 1]) if stage > 0 else 0
        for tiles in all_stages[layer][stage]:
            segments.append([tile, tiles.kind, layer, counter - 1, awaited])
            tile += tiles.n
        bounds[stage + 1] = tile
    n_segments = power_of_two(len(segments))
    segments += [[2**31, 0, 0, 0, 0]] * (n_segments - len(segments))

    scratch, stats = _Offsets(), _Offsets()
    rows = [_row(x, scratch, stats, backward) for x in layers]
    shapes, loose_shapes = _shapes(layers, rows, backward, kept)
    for n, row in enumerate(rows):
        row[f.DONE_COUNTER.value] = f.FIRST_COUNTER.value + n_stages * n
    if scratch.end >= 2**31:
        raise ValueError("the layers are too large for the Triton backend; use backend='reference'")
    links = f.FIRST_COUNTER.value + n_stages * len(layers)
    if kept:
        launches = [((*bounds[1:], links), programs)]
    elif single:
        launches = [((0,), tile)]
    else:
        launches = [((a,), b - a) for a, b in pairwise(bounds)]
    return Program(
        values=[value for row in (*segments, *rows) for value in row],
        n_segments=n_segments,
        launches=launches,
        kept=kept,
        shapes=shapes,
        loose_shapes=loose_shapes,
        scratch_size=scratch.end,
        stats_size=stats.end,
        counters_size=links + (bounds[1] if kept else 0),
    )
