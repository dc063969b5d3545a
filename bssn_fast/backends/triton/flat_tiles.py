"""The tiles that go through rows of weights which are one run of memory each, kernel positions innermost.

Those are flat rows and convolutions as torch stores them. A tile is [rows, columns] in the order of memory; a step
along the row is a whole number of channels, so that a lane has the same kernel position in every step. Where rows are
long, a thread has all of the tile's: what is added up over them stays in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_fast.backends.triton import fields as f
from bssn_fast.backends.triton.tiles import add_to_slot, field, pointer, ratio_and_multiplier


@triton.jit
def position(e, channel, k_size):
    """The kernel positions of the lanes.

    That neighbours among them are neighbours holds but at the ends of channels. Said all the same, it makes Triton 3.6
    spread a tile that is loaded from there over threads as the others are, by columns; wider loads would also take a
    promise of alignment, which nobody gives.
    """
    return tl.max_contiguous(e - channel * k_size, 2)


@triton.jit
def add_folded(p_fold, step, k_size, COLUMNS: tl.constexpr, BO: tl.constexpr, KB: tl.constexpr, ACC: tl.constexpr):
    """The sums over the lanes of one kernel position each, [rows, KB], of what lies at p_fold, [rows, COLUMNS]."""
    M: tl.constexpr = f.FOLD_BLOCK // (BO * KB) if f.FOLD_BLOCK > BO * KB else 1  # channels added at a time
    o = tl.arange(0, BO) * COLUMNS
    k = tl.arange(0, KB)[None, :]
    e = tl.arange(0, M)[:, None] * k_size + k
    parts = tl.zeros([BO, M, KB], ACC)
    for n in range(tl.cdiv(step, M * k_size)):
        start = n * M * k_size
        m = (k < k_size) & (start + e < step)
        parts += tl.load(p_fold + (o[:, None, None] + (start + e)[None, :, :]), mask=m[None, :, :], other=0)
    return tl.sum(parts, axis=1)


@triton.jit
def fold(p_fold, b_q, step, k_size, COLUMNS: tl.constexpr, BO: tl.constexpr, KB: tl.constexpr, ACC: tl.constexpr):
    """The sums over the lanes of one kernel position each, [rows, KB], by way of memory."""
    o = tl.arange(0, BO) * COLUMNS
    tl.store(p_fold + (o[:, None] + tl.arange(0, COLUMNS)[None, :]), b_q)
    tl.debug_barrier()
    sums = add_folded(p_fold, step, k_size, COLUMNS, BO, KB, ACC)
    tl.debug_barrier()  # the next rows are stored to the same place
    return sums


@triton.jit
def flat_rows_tile(
    row,
    tile,
    scratch,
    SHAPES: tl.constexpr,
    SHAPE: tl.constexpr,
    ITERATE: tl.constexpr,
    W_TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """s, q and the shares of t and r of ROWS_PER_TILE rows; without ITERATE only the products with the stored vectors.

    SHAPES[SHAPE] = (V, True, two-sided, rows, columns, power of two of kernel positions). r's share is not yet added up
    over kernel positions.
    """
    V: tl.constexpr = SHAPES[SHAPE][0]
    TWO: tl.constexpr = SHAPES[SHAPE][2]
    BO: tl.constexpr = SHAPES[SHAPE][3]
    COLUMNS: tl.constexpr = SHAPES[SHAPE][4]
    KB: tl.constexpr = SHAPES[SHAPE][5]
    VECTORS: tl.constexpr = V > 1

    k_size = field(row, f.K)
    step_vectors = field(row, f.STEP)
    row_vectors = field(row, f.SIZE + 1) // V
    channels = step_vectors * V // k_size
    steps = field(row, f.STEPS)
    weight = pointer(tl.load(row + f.WEIGHT), W_TYPE, VECTORS)
    v_out = pointer(tl.load(row + f.STORED + 1), ACC, VECTORS)
    u_in = pointer(tl.load(row + f.STORED + 2), ACC, VECTORS)
    slot = field(row, f.SLOTS) + tile * (row_vectors * (2 * V if TWO else V))
    slot = tl.multiple_of(slot, 4) if V % 4 == 0 else slot
    e = tl.arange(0, COLUMNS)
    channel = e // k_size
    rows_per_tile = field(row, f.ROWS_PER_TILE)
    first = tile * rows_per_tile
    last = tl.minimum(first + rows_per_tile, field(row, f.C_OUT))

    for o_start in range(first, last, BO):
        # What is needed once for these rows is loaded here, as registers are scarcer than loads.
        o = o_start + tl.arange(0, BO)
        m_o = o < last
        o_offset = o * (field(row, f.ROW_STRIDE) * V)
        b_s = tl.zeros([BO, COLUMNS // 4], ACC)  # four neighbours are one thread's: to add them first saves registers
        b_q = tl.zeros([BO, COLUMNS], ACC)
        for n in range(steps):
            start = n * step_vectors * V
            m_e = e < tl.minimum(step_vectors, row_vectors - n * step_vectors) * V
            p_w = weight + (o_offset[:, None] + (start + e)[None, :])
            w = tl.load(p_w, mask=m_o[:, None] & m_e[None, :], other=0).to(ACC)
            v = tl.load(v_out + (start + e), mask=m_e, other=0)
            b_s += tl.sum(tl.reshape(w * v[None, :], [BO, COLUMNS // 4, 4]), axis=2)
            if TWO:
                u = tl.load(u_in + (n * channels + channel), mask=m_e, other=0)
                b_q += w * u[None, :]
        s = tl.sum(b_s, axis=1)  # [BO]
        tl.store(scratch + (field(row, f.SOURCE) + o), s, mask=m_o)
        if TWO:
            o_q = (field(row, f.SOURCE + 3) + o * k_size)[:, None]
            p_fold = scratch + tl.multiple_of(field(row, f.FOLD) + tile * (BO * COLUMNS), 4)
            q_sum = fold(p_fold, b_q, step_vectors * V, k_size, COLUMNS, BO, KB, ACC)
            k = tl.arange(0, KB)[None, :]
            tl.store(scratch + (o_q + k), q_sum, mask=m_o[:, None] & (k < k_size))
        if ITERATE:
            # t is made with the very s whose square is added up: the compiler may add another one up in another order,
            # which is another number where s is the small rest of large products.
            tl.debug_barrier()
            s = tl.load(scratch + (field(row, f.SOURCE) + o), mask=m_o, other=0)
            if TWO:
                q = tl.load(scratch + (o_q + position(e, channel, k_size)[None, :]), mask=m_o[:, None], other=0)
            for n in range(steps):
                start = n * step_vectors * V
                m_e = e < tl.minimum(step_vectors, row_vectors - n * step_vectors) * V
                p_w = weight + (o_offset[:, None] + (start + e)[None, :])
                w = tl.load(p_w, mask=m_o[:, None] & m_e[None, :], other=0).to(ACC)
                p_t = scratch + (slot + start + e)
                add_to_slot(p_t, tl.sum(w * s[:, None], axis=0), m_e, o_start > first)
                if TWO:
                    add_to_slot(p_t + row_vectors * V, tl.sum(w * q, axis=0), m_e, o_start > first)
            tl.debug_barrier()  # the next rows add to the slot, perhaps from other threads


@triton.jit
def flat_gradient_tile(
    row,
    tile,
    grad_address,
    out_address,
    stats,
    snapshot,
    sigma,
    grad_gains,
    SHAPES: tl.constexpr,
    SHAPE: tl.constexpr,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """dW of ROWS_PER_TILE rows."""
    V: tl.constexpr = SHAPES[SHAPE][0]
    TWO: tl.constexpr = SHAPES[SHAPE][2]
    BO: tl.constexpr = SHAPES[SHAPE][3]
    COLUMNS: tl.constexpr = SHAPES[SHAPE][4]
    VECTORS: tl.constexpr = V > 1

    k_size = field(row, f.K)
    step_vectors = field(row, f.STEP)
    row_vectors = field(row, f.SIZE + 1) // V
    channels = step_vectors * V // k_size
    steps = field(row, f.STEPS)
    grad = pointer(grad_address, G_TYPE, VECTORS)
    out = pointer(out_address, W_TYPE, VECTORS)
    snapshot = tl.multiple_of(snapshot, 16) if VECTORS else snapshot
    u_out = snapshot + tl.load(row + f.SNAPSHOT)
    v_out = snapshot + tl.multiple_of(tl.load(row + f.SNAPSHOT + 1), 4)
    u_in = snapshot + tl.load(row + f.SNAPSHOT + 2)
    v_in = snapshot + tl.load(row + f.SNAPSHOT + 3)
    ratio, multiplier = ratio_and_multiplier(row, tile, stats, sigma, grad_gains, TWO, ACC)

    e = tl.arange(0, COLUMNS)
    channel = e // k_size
    rows_per_tile = field(row, f.ROWS_PER_TILE)
    first = tile * rows_per_tile
    last = tl.minimum(first + rows_per_tile, field(row, f.C_OUT))
    for o_start in range(first, last, BO):
        o = o_start + tl.arange(0, BO)
        m_o = o < last
        o_offset = o * (field(row, f.ROW_STRIDE) * V)
        b_u_out = tl.load(u_out + o, mask=m_o, other=0) * ratio
        if TWO:
            o_v_in = (o * k_size)[:, None] + position(e, channel, k_size)[None, :]
            b_v_in = tl.load(v_in + o_v_in, mask=m_o[:, None], other=0) * ratio
        for n in range(steps):
            start = n * step_vectors * V
            m_e = e < tl.minimum(step_vectors, row_vectors - n * step_vectors) * V
            m = m_o[:, None] & m_e[None, :]
            w_offset = o_offset[:, None] + (start + e)[None, :]
            b_grad = tl.load(grad + w_offset, mask=m, other=0, eviction_policy="evict_first").to(ACC)
            b_v_out = tl.load(v_out + (start + e), mask=m_e, other=0)
            b_grad -= b_u_out[:, None] * b_v_out[None, :]
            if TWO:
                b_u_in = tl.load(u_in + (n * channels + channel), mask=m_e, other=0)
                b_grad -= b_u_in[None, :] * b_v_in
            tl.store(out + w_offset, (multiplier * b_grad).to(W_TYPE), mask=m, cache_modifier=".cs")
