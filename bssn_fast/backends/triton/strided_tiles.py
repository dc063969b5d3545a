"""The tiles that go through rows of weights in any other order: channels_last, transposed.

"Group" means V neighbouring input channels, K kernel positions each: the K V elements that a row of a tile holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_fast.backends.triton import fields as f
from bssn_fast.backends.triton.tiles import add_to_slot, field, place, pointer, ratio_and_multiplier


@triton.jit
def strided_rows_tile(
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

    SHAPES[SHAPE] = (V, False, two-sided, rows, groups, positions) of the register tile.
    """
    V: tl.constexpr = SHAPES[SHAPE][0]
    TWO: tl.constexpr = SHAPES[SHAPE][2]
    BO: tl.constexpr = SHAPES[SHAPE][3]
    BG: tl.constexpr = SHAPES[SHAPE][4]
    BJ: tl.constexpr = SHAPES[SHAPE][5]
    VECTORS: tl.constexpr = V > 1

    k_size = field(row, f.K)
    groups = field(row, f.GROUPS)
    group_stride = field(row, f.GROUP_STRIDE)
    weight = pointer(tl.load(row + f.WEIGHT), W_TYPE, VECTORS)
    v_out = pointer(tl.load(row + f.STORED + 1), ACC, VECTORS)
    u_in = pointer(tl.load(row + f.STORED + 2), ACC, VECTORS)
    n_out_columns = field(row, f.SIZE + 1)
    slot = field(row, f.SLOTS) + tile * (n_out_columns + field(row, f.SIZE + 2))
    slot = tl.multiple_of(slot, 4) if V % 4 == 0 else slot

    g, d, k, position, offset, m_group = place(row, SHAPES, SHAPE)
    rows_per_tile = field(row, f.ROWS_PER_TILE)
    first = tile * rows_per_tile
    last = tl.minimum(first + rows_per_tile, field(row, f.C_OUT))
    o_o = tl.arange(0, BO)
    o_j = tl.arange(0, BJ)

    for o_start in range(first, last, BO):
        # What is needed once for these rows is loaded here, as registers are scarcer than loads.
        o = o_start + o_o
        m_o = o < last
        o_offset = o * (field(row, f.ROW_STRIDE) * V)
        b_s = tl.zeros([BO, BG * BJ // 4], ACC)  # four neighbours are one thread's: to add them first saves registers
        b_q = tl.zeros([BO, BG * BJ], ACC)
        for g_start in range(0, groups, BG):
            m_e = m_group & (g_start + g < groups)
            p_w = weight + (o_offset[:, None] + (g_start * (group_stride * V) + offset)[None, :])
            w = tl.load(p_w, mask=m_o[:, None] & m_e[None, :], other=0).to(ACC)  # [BO, BG BJ]
            v = tl.load(v_out + (g_start * (k_size * V) + position), mask=m_e, other=0)
            b_s += tl.sum(tl.reshape(w * v[None, :], [BO, BG * BJ // 4, 4]), axis=2)
            if TWO:
                u = tl.load(u_in + ((g_start + g) * V + d), mask=m_e, other=0)
                b_q += w * u[None, :]
        s = tl.sum(b_s, axis=1)  # [BO]
        tl.store(scratch + (field(row, f.SOURCE) + o), s, mask=m_o)
        if TWO:
            q_all = field(row, f.SOURCE + 3)
            q = tl.sum(tl.reshape(b_q, [BO, BG, BJ]), axis=1)  # [BO, BJ]
            j_channel = o_j % V
            j_k = o_j // V
            m_oj = m_o[:, None] & (o_j < k_size * V)[None, :]
            if V > 1:  # a group's V channels have separate sums so far
                o_fold = (field(row, f.FOLD) + o * (k_size * V))[:, None]
                tl.store(scratch + (o_fold + (j_channel * k_size + j_k)[None, :]), q, mask=m_oj)
                tl.debug_barrier()
                q = tl.zeros([BO, BJ], ACC)
                for n in tl.static_range(V):
                    q += tl.load(scratch + (o_fold + (n * k_size + j_k)[None, :]), mask=m_oj, other=0)
            tl.store(scratch + ((q_all + o * k_size)[:, None] + j_k[None, :]), q, mask=m_oj & (j_channel == 0)[None, :])
            if ITERATE:
                tl.debug_barrier()
                o_q = (q_all + o * k_size)[:, None] + k[None, :]
                q = tl.load(scratch + o_q, mask=m_o[:, None] & m_group[None, :], other=0)  # [BO, BG BJ]

        if ITERATE:
            tl.debug_barrier()
            s = tl.load(scratch + (field(row, f.SOURCE) + o), mask=m_o, other=0)  # the same for t: see flat_tiles
            for g_start in range(0, groups, BG):
                m_e = m_group & (g_start + g < groups)
                p_w = weight + (o_offset[:, None] + (g_start * (group_stride * V) + offset)[None, :])
                w = tl.load(p_w, mask=m_o[:, None] & m_e[None, :], other=0).to(ACC)
                p_t = scratch + (slot + g_start * (k_size * V) + position)
                add_to_slot(p_t, tl.sum(w * s[:, None], axis=0), m_e, o_start > first)
                if TWO:
                    wq = tl.sum(w * q, axis=0)  # [BG BJ]
                    o_r = slot + n_out_columns + g_start * V
                    o_g = tl.arange(0, BG)
                    m_g = g_start + o_g < groups
                    part = tl.sum(tl.reshape(wq, [BG, BJ // V, V]), axis=1)
                    o_channel = (o_g * V)[:, None] + tl.arange(0, V)[None, :]
                    add_to_slot(scratch + (o_r + o_channel), part, m_g[:, None], o_start > first)
            tl.debug_barrier()  # the next rows add to the slot, perhaps from other threads


@triton.jit
def strided_gradient_tile(
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
    BG: tl.constexpr = SHAPES[SHAPE][4]
    VECTORS: tl.constexpr = V > 1

    k_size = field(row, f.K)
    groups = field(row, f.GROUPS)
    row_stride = field(row, f.ROW_STRIDE)
    group_stride = field(row, f.GROUP_STRIDE)
    grad = pointer(grad_address, G_TYPE, VECTORS)
    out = pointer(out_address, W_TYPE, VECTORS)
    snapshot = tl.multiple_of(snapshot, 16) if VECTORS else snapshot
    u_out = snapshot + tl.load(row + f.SNAPSHOT)
    v_out = snapshot + tl.multiple_of(tl.load(row + f.SNAPSHOT + 1), 4)
    u_in = snapshot + tl.load(row + f.SNAPSHOT + 2)
    v_in = snapshot + tl.load(row + f.SNAPSHOT + 3)

    ratio, multiplier = ratio_and_multiplier(row, tile, stats, sigma, grad_gains, TWO, ACC)
    g, d, k, position, offset, m_group = place(row, SHAPES, SHAPE)
    rows_per_tile = field(row, f.ROWS_PER_TILE)
    first = tile * rows_per_tile
    last = tl.minimum(first + rows_per_tile, field(row, f.C_OUT))
    for o_start in range(first, last, BO):
        o = o_start + tl.arange(0, BO)
        m_o = o < last
        o_offset = o * (row_stride * V)
        b_u_out = tl.load(u_out + o, mask=m_o, other=0)
        if TWO:
            o_v_in = (o * k_size)[:, None] + k[None, :]
            b_v_in = tl.load(v_in + o_v_in, mask=m_o[:, None] & m_group[None, :], other=0)
        for g_start in range(0, groups, BG):
            m_e = m_group & (g_start + g < groups)
            m = m_o[:, None] & m_e[None, :]
            b_v_out = tl.load(v_out + (g_start * (k_size * V) + position), mask=m_e, other=0)
            direction = b_u_out[:, None] * b_v_out[None, :]  # [BO, BG BJ]
            if TWO:
                b_u_in = tl.load(u_in + ((g_start + g) * V + d), mask=m_e, other=0)
                direction += b_u_in[None, :] * b_v_in
            w_offset = o_offset[:, None] + (g_start * (group_stride * V) + offset)[None, :]
            b_grad = tl.load(grad + w_offset, mask=m, other=0, eviction_policy="evict_first").to(ACC)
            tl.store(out + w_offset, (multiplier * (b_grad - ratio * direction)).to(W_TYPE), mask=m)
