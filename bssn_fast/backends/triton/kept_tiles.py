"""Tiles of rows that a program keeps in registers, from the power iteration until the weight's multiplier is known.

The maths and the order of all sums are those of `flat_tiles`, for tiles that a program holds as a whole: BLOCKS times
BO rows, STEPS times COLUMNS columns, in BLOCKS * STEPS pieces of [BO, COLUMNS]. So W is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_fast.backends.triton import fields as f
from bssn_fast.backends.triton.flat_tiles import add_folded, position
from bssn_fast.backends.triton.forward_tiles import both_sides
from bssn_fast.backends.triton.tiles import field, multiplier_of, pointer, rounded


@triton.jit
def rows_of(row, tile, block, BO: tl.constexpr):
    """(rows, which of them the tile has) of the block's BO rows."""
    rows_per_tile = field(row, f.ROWS_PER_TILE)
    first = tile * rows_per_tile
    o = first + block * BO + tl.arange(0, BO)
    return o, o < tl.minimum(first + rows_per_tile, field(row, f.C_OUT))


@triton.jit
def columns_of(row, n, V: tl.constexpr, COLUMNS: tl.constexpr):
    """(columns of step n, which of them the row has)."""
    step_vectors = field(row, f.STEP)
    e = tl.arange(0, COLUMNS)
    row_vectors = field(row, f.SIZE + 1) // V
    return n * step_vectors * V + e, e < tl.minimum(step_vectors, row_vectors - n * step_vectors) * V


@triton.jit
def load_kept(row, tile, SHAPES: tl.constexpr, SHAPE: tl.constexpr, W_TYPE: tl.constexpr, ACC: tl.constexpr):
    """The tile's pieces, block after block, and within a block step after step; zeros where the weight has nothing.

    In ACC, as 16-bit elements take a register each, too, and the compiler would keep both.

    SHAPES[SHAPE] = (V, True, two-sided, BO, COLUMNS, power of two of kernel positions, BLOCKS, STEPS).
    """
    V: tl.constexpr = SHAPES[SHAPE][0]
    BO: tl.constexpr = SHAPES[SHAPE][3]
    COLUMNS: tl.constexpr = SHAPES[SHAPE][4]
    BLOCKS: tl.constexpr = SHAPES[SHAPE][6]
    STEPS: tl.constexpr = SHAPES[SHAPE][7]
    weight = pointer(tl.load(row + f.WEIGHT), W_TYPE, V > 1)
    pieces = ()
    for block in tl.static_range(BLOCKS):
        o, m_o = rows_of(row, tile, block, BO)
        o_offset = o * (field(row, f.ROW_STRIDE) * V)
        for n in tl.static_range(STEPS):
            e, m_e = columns_of(row, n, V, COLUMNS)
            w = tl.load(weight + (o_offset[:, None] + e[None, :]), mask=m_o[:, None] & m_e[None, :], other=0)
            pieces += (w.to(ACC),)
    return pieces


@triton.jit
def first_products(
    row,
    tile,
    pieces,
    scratch,
    SHAPES: tl.constexpr,
    SHAPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """s and q of the tile's rows, to scratch."""
    V: tl.constexpr = SHAPES[SHAPE][0]
    TWO: tl.constexpr = SHAPES[SHAPE][2]
    BO: tl.constexpr = SHAPES[SHAPE][3]
    COLUMNS: tl.constexpr = SHAPES[SHAPE][4]
    KB: tl.constexpr = SHAPES[SHAPE][5]
    BLOCKS: tl.constexpr = SHAPES[SHAPE][6]
    STEPS: tl.constexpr = SHAPES[SHAPE][7]

    k_size = field(row, f.K)
    step = field(row, f.STEP) * V
    v_out = pointer(tl.load(row + f.STORED + 1), ACC, V > 1)
    u_in = pointer(tl.load(row + f.STORED + 2), ACC, V > 1)
    channel = tl.arange(0, COLUMNS) // k_size
    fold_stride = field(row, f.N_ROW_TILES) * (BO * COLUMNS)
    p_fold = scratch + tl.multiple_of(field(row, f.FOLD) + tile * (BO * COLUMNS), 4)
    o_fold = (tl.arange(0, BO) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    for block in tl.static_range(BLOCKS):
        b_s = tl.zeros([BO, COLUMNS // 4], ACC)
        b_q = tl.zeros([BO, COLUMNS], ACC)
        for n in tl.static_range(STEPS):
            e, m_e = columns_of(row, n, V, COLUMNS)
            w = pieces[block * STEPS + n]
            v = tl.load(v_out + e, mask=m_e, other=0)
            b_s += tl.sum(tl.reshape(w * v[None, :], [BO, COLUMNS // 4, 4]), axis=2)
            if TWO:
                u = tl.load(u_in + (n * (step // k_size) + channel), mask=m_e, other=0)
                b_q += w * u[None, :]
        o, m_o = rows_of(row, tile, block, BO)
        tl.store(scratch + (field(row, f.SOURCE) + o), tl.sum(b_s, axis=1), mask=m_o)
        if TWO:
            tl.store(p_fold + block * fold_stride + o_fold, b_q)
    if TWO:
        tl.debug_barrier()
        k = tl.arange(0, KB)[None, :]
        for block in tl.static_range(BLOCKS):
            q = add_folded(p_fold + block * fold_stride, step, k_size, COLUMNS, BO, KB, ACC)
            o, m_o = rows_of(row, tile, block, BO)
            o_q = (field(row, f.SOURCE + 3) + o * k_size)[:, None]
            tl.store(scratch + (o_q + k), q, mask=m_o[:, None] & (k < k_size))


@triton.jit
def second_products(
    row,
    tile,
    pieces,
    scratch,
    SHAPES: tl.constexpr,
    SHAPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The tile's shares of t and r, to its slot; s and q come from scratch, as in `flat_tiles`."""
    V: tl.constexpr = SHAPES[SHAPE][0]
    TWO: tl.constexpr = SHAPES[SHAPE][2]
    BO: tl.constexpr = SHAPES[SHAPE][3]
    COLUMNS: tl.constexpr = SHAPES[SHAPE][4]
    BLOCKS: tl.constexpr = SHAPES[SHAPE][6]
    STEPS: tl.constexpr = SHAPES[SHAPE][7]

    k_size = field(row, f.K)
    c = tl.arange(0, COLUMNS)
    t = ()
    r = ()
    for block in tl.static_range(BLOCKS):
        o, m_o = rows_of(row, tile, block, BO)
        s = tl.load(scratch + (field(row, f.SOURCE) + o), mask=m_o, other=0)
        if TWO:
            o_q = (field(row, f.SOURCE + 3) + o * k_size)[:, None]
            q = tl.load(scratch + (o_q + position(c, c // k_size, k_size)[None, :]), mask=m_o[:, None], other=0)
        before_t = t
        before_r = r
        t = ()
        r = ()
        for n in tl.static_range(STEPS):
            w = pieces[block * STEPS + n]
            b_t = tl.sum(w * s[:, None], axis=0)
            if block > 0:
                b_t += before_t[n]
            t += (b_t,)
            if TWO:
                b_r = tl.sum(w * q, axis=0)
                if block > 0:
                    b_r += before_r[n]
                r += (b_r,)
    row_size = field(row, f.SIZE + 1) // V * V
    slot = field(row, f.SLOTS) + tile * (row_size * (2 if TWO else 1))
    slot = tl.multiple_of(slot, 4) if V % 4 == 0 else slot
    for n in tl.static_range(STEPS):
        e, m_e = columns_of(row, n, V, COLUMNS)
        tl.store(scratch + (slot + e), t[n], mask=m_e)
        if TWO:
            tl.store(scratch + (slot + row_size + e), r[n], mask=m_e)


@triton.jit
def lay_flat(pieces, zeros, PIECE: tl.constexpr, PIECES: tl.constexpr, N: tl.constexpr):
    """N pieces as runs of PIECE elements, and zeros: tiles of all shapes are held in the same registers."""
    flat = ()
    for n in tl.static_range(PIECES):
        if n < N:
            flat += (tl.reshape(pieces[n], [PIECE]),)
        else:
            flat += (zeros[n],)
    return flat


@triton.jit
def write_kept(
    row,
    tile,
    flat,
    out_address,
    multiplier,
    SHAPES: tl.constexpr,
    SHAPE: tl.constexpr,
    OUT_TYPE: tl.constexpr,
):
    """The tile's part of the normalised weight, from what `lay_flat` returned."""
    V: tl.constexpr = SHAPES[SHAPE][0]
    BO: tl.constexpr = SHAPES[SHAPE][3]
    COLUMNS: tl.constexpr = SHAPES[SHAPE][4]
    BLOCKS: tl.constexpr = SHAPES[SHAPE][6]
    STEPS: tl.constexpr = SHAPES[SHAPE][7]
    out = pointer(out_address, OUT_TYPE, V > 1)
    for block in tl.static_range(BLOCKS):
        o, m_o = rows_of(row, tile, block, BO)
        o_offset = o * (field(row, f.ROW_STRIDE) * V)
        for n in tl.static_range(STEPS):
            e, m_e = columns_of(row, n, V, COLUMNS)
            w = tl.reshape(flat[block * STEPS + n], [BO, COLUMNS])
            p_out = out + (o_offset[:, None] + e[None, :])
            x = rounded(w * multiplier, OUT_TYPE)
            tl.store(p_out, x, mask=m_o[:, None] & m_e[None, :], cache_modifier=".cs")


@triton.jit
def write_dropped(
    row,
    tile,
    out_address,
    stats,
    eps,
    ITERATE: tl.constexpr,
    W_TYPE: tl.constexpr,
    OUT_TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The same, of a tile that is read again; its rows are one run of memory."""
    weight = pointer(tl.load(row + f.WEIGHT), W_TYPE, False)
    out = pointer(out_address, OUT_TYPE, False)
    multiplier = multiplier_of(row, both_sides(row, stats, eps, ITERATE)[0].to(ACC), ACC)
    size = field(row, f.ROWS_PER_TILE) * field(row, f.SIZE + 1)
    end = tl.minimum((tile + 1) * size, field(row, f.NUMEL))
    for start in range(tile * size, end, f.DROPPED_BLOCK):
        o = start + tl.arange(0, f.DROPPED_BLOCK)
        w = tl.load(weight + o, mask=o < end, other=0)
        tl.store(out + o, rounded(w.to(ACC) * multiplier, OUT_TYPE), mask=o < end)
