"""The kernels: each program takes one tile and runs it. All layers of a call, whatever their shapes, share a launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bssn_fast.backends.triton import fields as f
from bssn_fast.backends.triton.backward_tiles import inner_tile
from bssn_fast.backends.triton.flat_tiles import flat_gradient_tile, flat_rows_tile
from bssn_fast.backends.triton.forward_tiles import both_sides, columns_tile, scaling_tile, vectors_tile
from bssn_fast.backends.triton.kept_tiles import (
    first_products,
    lay_flat,
    load_kept,
    second_products,
    write_dropped,
    write_kept,
)
from bssn_fast.backends.triton.strided_tiles import strided_gradient_tile, strided_rows_tile
from bssn_fast.backends.triton.tiles import (
    announce,
    choose,
    decode,
    draw,
    field,
    float_of,
    layer_and_tile,
    multiplier_of,
    take_tile,
    wait_for,
)


@triton.jit(do_not_specialize=["first_out", "eps_bits", "first_tile"])
def forward_kernel(
    layers,
    segments,
    counters,
    scratch,
    stats,
    snapshot,
    sigmas,
    first_out: tl.int64,
    eps_bits: tl.int64,
    first_tile: tl.int64,
    SHAPES: tl.constexpr,
    N_SEGMENTS: tl.constexpr,
    SINGLE: tl.constexpr,
    ITERATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    W_TYPE: tl.constexpr,
    OUT_TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """One tile of the forward pass.

    layers, segments: rows of the table. counters: int64. scratch: ACC. stats: fp64. snapshot, sigmas: ACC.
    first_out: address of the first normalised weight. SHAPES: the tile shapes that occur.
    SINGLE: all phases in this launch.
    """
    tile, segment = take_tile(segments, counters, first_tile, SINGLE, N_SEGMENTS)
    kind = field(segments + segment, f.KIND)
    layer = field(segments + segment, f.LAYER)
    row = layers + layer * f.LAYER_FIELDS
    eps = float_of(eps_bits)
    done = 0  # looked up after the tile, which has no register to keep it in
    if kind == f.ROWS:
        shape = field(row, f.SHAPE)
        for n in tl.static_range(len(SHAPES)):
            if shape == n:
                if SHAPES[n][1]:
                    flat_rows_tile(row, tile, scratch, SHAPES, n, ITERATE, W_TYPE, ACC)
                else:
                    strided_rows_tile(row, tile, scratch, SHAPES, n, ITERATE, W_TYPE, ACC)
        done = field(row, f.DONE_COUNTER)
    elif kind == f.COLUMNS:
        columns_tile(row, tile, scratch, stats, ITERATE, ACC)
        done = field(row, f.DONE_COUNTER) + 1
    elif kind == f.VECTORS:
        vectors_tile(row, tile, scratch, stats, snapshot, sigmas, eps, ITERATE, ACC)
    else:
        out = first_out + tl.load(row + f.OUTPUT)
        scaling_tile(row, tile, out, stats, eps, ALIGNED, ITERATE, W_TYPE, OUT_TYPE, ACC)
    if SINGLE:
        announce(counters, done)


@triton.jit(do_not_specialize=["first_out", "first_tile"])
def backward_kernel(
    layers,
    segments,
    counters,
    scratch,
    stats,
    snapshot,
    sigmas,
    first_out: tl.int64,
    addresses,
    grads,
    grad_gains,
    first_tile: tl.int64,
    SHAPES: tl.constexpr,
    N_SEGMENTS: tl.constexpr,
    SINGLE: tl.constexpr,
    TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """One tile of the backward pass.

    The arguments are those of `forward_kernel`, but for
    grads: encoded addresses of the gradients; with TABLE they lie in `addresses` instead.
    grad_gains: ACC, to write: the gradients of gains.
    """
    tile, segment = take_tile(segments, counters, first_tile, SINGLE, N_SEGMENTS)
    layer = field(segments + segment, f.LAYER)
    row = layers + layer * f.LAYER_FIELDS
    sigma = tl.load(sigmas + field(row, f.INDEX))
    done = 0
    if TABLE:
        grad = tl.load(addresses + layer)
    else:
        grad = choose(grads, layer)
    if field(segments + segment, f.KIND) == f.INNER:
        inner_tile(row, tile, grad, stats, sigma, ALIGNED, W_TYPE, G_TYPE, ACC)
        done = field(row, f.DONE_COUNTER)
    else:
        out = first_out + tl.load(row + f.OUTPUT)
        shape = field(row, f.SHAPE)
        for n in tl.static_range(len(SHAPES)):
            if shape == n:
                what = (row, tile, grad, out, stats, snapshot, sigma, grad_gains)
                if SHAPES[n][1]:
                    flat_gradient_tile(*what, SHAPES, n, W_TYPE, G_TYPE, ACC)
                else:
                    strided_gradient_tile(*what, SHAPES, n, W_TYPE, G_TYPE, ACC)
    if SINGLE:
        announce(counters, done)


@triton.jit
def wait_for_columns(row, launch, counters, ITERATE: tl.constexpr):
    """Wait until all of the layer's column tiles are finished."""
    count = 1
    if ITERATE:
        count += field(row, f.N_OUT_COLUMN_TILES) + field(row, f.N_IN_COLUMN_TILES)
    wait_for(counters + (field(row, f.DONE_COUNTER) + 1), (launch + 1) * count)


@triton.jit(do_not_specialize=["first_out", "eps_bits", "rows_end", "columns_end", "end", "links"])
def registers_kernel(
    layers,
    segments,
    counters,
    scratch,
    stats,
    snapshot,
    sigmas,
    first_out: tl.int64,
    eps_bits: tl.int64,
    rows_end: tl.int64,
    columns_end: tl.int64,
    end: tl.int64,
    links: tl.int64,
    SHAPES: tl.constexpr,
    LOOSE_SHAPES: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    N_SEGMENTS: tl.constexpr,
    ITERATE: tl.constexpr,
    W_TYPE: tl.constexpr,
    OUT_TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The forward pass of a small model, by programs that keep their rows in registers between their two uses.

    Tickets are numbered stage by stage: rows to `rows_end`, columns to `columns_end`, vectors to `end`. A program takes
    a tile of rows, and then column tickets as long as there are any. When it is told that there are none, all of them
    have been taken by programs that run, and those wait for nothing but rows, which wait for nothing: now it may wait
    for its layer's columns. So no program needs others to be resident at the same time, and one that is stopped for a
    while, as under MPS, goes on with its ticket later. If a program's next ticket is one of rows, as when other kernels
    leave room for few programs, it drops the tile that it has, and reads it again when all tickets have been taken:
    places `links` + ticket of `counters` have the list of those.

    Only a program's first tile is kept: in a loop, each sum over threads would hold a register all the time.

    The arguments are otherwise those of `forward_kernel`; SHAPES are those of `load_kept`.
    """
    eps = float_of(eps_bits)
    zeros = ()
    for _ in tl.static_range(PIECES):
        zeros += (tl.zeros([PIECE], ACC),)
    pieces = zeros
    nothing = tl.full([], -1, tl.int32)
    kept = nothing  # ticket of the tile that `pieces` are of
    dropped = nothing  # ticket of the last tile that has to be read again
    ticket, launch = draw(counters, end)
    if ticket < rows_end:
        row, tile = layer_and_tile(ticket, launch, layers, segments, counters, N_SEGMENTS)
        shape = field(row, f.SHAPE)
        if shape < len(SHAPES):
            kept = ticket
            for n in tl.static_range(len(SHAPES)):
                if shape == n:
                    loaded = load_kept(row, tile, SHAPES, n, W_TYPE, ACC)
                    first_products(row, tile, loaded, scratch, SHAPES, n, ACC)
                    if ITERATE:
                        tl.debug_barrier()
                        second_products(row, tile, loaded, scratch, SHAPES, n, ACC)
                    pieces = lay_flat(loaded, zeros, PIECE, PIECES, SHAPES[n][6] * SHAPES[n][7])
            announce(counters, field(row, f.DONE_COUNTER))
            ticket, launch = draw(counters, end)
    if ticket < rows_end:
        if kept >= 0:
            tl.store(counters + links + kept, dropped.to(tl.int64))
            dropped = kept
            kept = nothing
        while ticket < rows_end:
            row, tile = layer_and_tile(ticket, launch, layers, segments, counters, N_SEGMENTS)
            shape = field(row, f.LOOSE_SHAPE)
            for n in tl.static_range(len(LOOSE_SHAPES)):
                if shape == n:
                    flat_rows_tile(row, tile, scratch, LOOSE_SHAPES, n, ITERATE, W_TYPE, ACC)
            announce(counters, field(row, f.DONE_COUNTER))
            tl.store(counters + links + ticket, dropped.to(tl.int64))
            dropped = ticket
            ticket, launch = draw(counters, end)
        pieces = zeros  # so that they need no registers in here
    while ticket < columns_end:
        row, tile = layer_and_tile(ticket, launch, layers, segments, counters, N_SEGMENTS)
        columns_tile(row, tile, scratch, stats, ITERATE, ACC)
        announce(counters, field(row, f.DONE_COUNTER) + 1)
        ticket, launch = draw(counters, end)
    if kept >= 0:
        row, tile = layer_and_tile(kept, launch, layers, segments, counters, N_SEGMENTS)
        wait_for_columns(row, launch, counters, ITERATE)
        out = first_out + tl.load(row + f.OUTPUT)
        multiplier = multiplier_of(row, both_sides(row, stats, eps, ITERATE)[0].to(ACC), ACC)
        shape = field(row, f.SHAPE)
        for n in tl.static_range(len(SHAPES)):
            if shape == n:
                write_kept(row, tile, pieces, out, multiplier, SHAPES, n, OUT_TYPE)
    while ticket < end:
        row, tile = layer_and_tile(ticket, launch, layers, segments, counters, N_SEGMENTS)
        vectors_tile(row, tile, scratch, stats, snapshot, sigmas, eps, ITERATE, ACC)
        ticket, launch = draw(counters, end)
    while dropped >= 0:
        row, tile = layer_and_tile(dropped, launch, layers, segments, counters, N_SEGMENTS)
        wait_for_columns(row, launch, counters, ITERATE)
        out = first_out + tl.load(row + f.OUTPUT)
        write_dropped(row, tile, out, stats, eps, ITERATE, W_TYPE, OUT_TYPE, ACC)
        dropped = tl.load(counters + links + dropped).to(tl.int32)


@triton.jit
def probe_kernel(counter):
    """What the other kernels rest on, in a kernel that compiles at once."""
    tile = tl.atomic_add(counter, 1, sem="relaxed")
    wait_for(counter, tile)
    announce(counter, tile)


def load(kernel, *arguments, **options) -> None:
    """Compile a kernel for the current device and load it there, without a launch; raises whatever goes wrong."""
    compiled = kernel.warmup(*arguments, grid=(1,), **options)
    if compiled is not None:  # as it is in the interpreter
        compiled._init_handles()  # `compiled.run` does it too, but raises only the first time


def compile_probe() -> None:
    """Load a small kernel; raises whatever goes wrong."""
    load(probe_kernel, torch.int64)


@triton.jit(do_not_specialize=["start"])
def table_kernel(table, start: tl.int64, values):
    """Write encoded integers to `table` from `start`.

    As arguments they are part of the launch, so that the replay of a captured graph does not depend on host memory.
    """
    for n in tl.static_range(len(values)):
        tl.store(table + start + n, decode(values[n]))
