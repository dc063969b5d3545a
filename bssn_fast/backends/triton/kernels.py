"""The kernels: each program takes one tile and runs it. All layers of a call, whatever their shapes, share a launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bssn_fast.backends.triton import fields as f
from bssn_fast.backends.triton.backward_tiles import inner_tile
from bssn_fast.backends.triton.flat_tiles import flat_gradient_tile, flat_rows_tile
from bssn_fast.backends.triton.forward_tiles import columns_tile, scaling_tile, vectors_tile
from bssn_fast.backends.triton.strided_tiles import strided_gradient_tile, strided_rows_tile
from bssn_fast.backends.triton.tiles import announce, choose, decode, field, float_of, take_tile, wait_for


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
