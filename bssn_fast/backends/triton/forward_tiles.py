"""The tiles of the forward pass; the maths is that of reference.py, in the names of the package's documentation.

rows     s[o] = sum_ik W[o,i,k] v_out[i,k]      q[o,k] = sum_i W[o,i,k] u_in[i]      (one read of W)
         and this tile's rows' share of t[i,k] = sum_o W[o,i,k] s[o] and r[i] = sum_ok W[o,i,k] q[o,k]
columns  t and r: the row tiles' shares added in their order
vectors  u_out = s/|s|, v_out = t/|t|, v_in = q/|q|, u_in = r/|r|, to the persistent vectors and the snapshot
scaling  W scale/sigma, sigma_out = |t|/|s| and sigma_in = |r|/|q|
"""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_fast.backends.triton import fields as f
from bssn_fast.backends.triton.tiles import field, place, pointer, sum_of


@triton.jit
def add_to_slot(p_slot, part, mask, is_later):
    """Write the first rows' part to the slot and add that of later ones; the caller puts a barrier between them."""
    tl.store(p_slot, part + tl.load(p_slot, mask=mask & is_later, other=0), mask=mask)


@triton.jit
def rows_tile(
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

    SHAPES[SHAPE] = (V, kernel positions innermost, two-sided, rows, groups, positions) of the register tile.
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
            j_channel = o_j // k_size if SHAPES[SHAPE][1] else o_j % V
            j_k = o_j % k_size if SHAPES[SHAPE][1] else o_j // V
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
                    if SHAPES[SHAPE][1]:
                        for n in tl.static_range(V):
                            part = tl.sum(tl.reshape(tl.where(d == n, wq, 0), [BG, BJ]), axis=1)
                            add_to_slot(scratch + (o_r + o_g * V + n), part, m_g, o_start > first)
                    else:
                        part = tl.sum(tl.reshape(wq, [BG, BJ // V, V]), axis=1)
                        o_channel = (o_g * V)[:, None] + tl.arange(0, V)[None, :]
                        add_to_slot(scratch + (o_r + o_channel), part, m_g[:, None], o_start > first)
            tl.debug_barrier()  # the next rows add to the slot, perhaps from other threads


@triton.jit
def square_and_product(row, N: tl.constexpr, total, scratch, ACC: tl.constexpr):
    """|x|^2 and x.y of the first product x of a direction and the stored vector y that it replaces, vector N."""
    x_all = scratch + tl.load(row + f.SOURCE + N)
    y_all = tl.load(row + f.STORED + N).to(tl.pointer_type(ACC))
    size = field(row, f.SIZE + N)
    square = tl.zeros([f.VECTOR_BLOCK], tl.float64)
    product = tl.zeros([f.VECTOR_BLOCK], tl.float64)
    for start in range(0, size, f.VECTOR_BLOCK):
        o = start + tl.arange(0, f.VECTOR_BLOCK)
        x = tl.load(x_all + o, mask=o < size, other=0).to(tl.float64)
        square += x * x
        product += x * tl.load(y_all + o, mask=o < size, other=0)
    tl.store(total, tl.sum(square, axis=0))
    tl.store(total + 1, tl.sum(product, axis=0))


@triton.jit
def columns_tile(row, tile, scratch, stats, ITERATE: tl.constexpr, ACC: tl.constexpr):
    """Tile 0: |s|^2, u_out.s, |q|^2 and v_in.q. Others: COLUMN_BLOCK entries of t, then of r, and their squares."""
    totals = stats + tl.load(row + f.STATS)
    if tile == 0:
        square_and_product(row, 0, totals, scratch, ACC)
        square_and_product(row, 3, totals + 2, scratch, ACC)
    elif ITERATE:
        n_row_tiles = field(row, f.N_ROW_TILES)
        n_out_tiles = field(row, f.N_OUT_COLUMN_TILES)
        n_out_columns = tl.load(row + f.SIZE + 1)
        n_in_columns = tl.load(row + f.SIZE + 2)
        is_in = tile > n_out_tiles
        size = tl.where(is_in, n_in_columns, n_out_columns)
        column = (tile - 1 - tl.where(is_in, n_out_tiles, 0)) * f.COLUMN_BLOCK + tl.arange(0, f.COLUMN_BLOCK)
        m_column = column < size
        slots = scratch + tl.load(row + f.SLOTS) + tl.where(is_in, n_out_columns, 0)
        o_slot = tl.arange(0, f.SLOT_BLOCK)
        parts = tl.zeros([f.SLOT_BLOCK, f.COLUMN_BLOCK], ACC)
        for start in range(0, n_row_tiles, f.SLOT_BLOCK):
            slot = start + o_slot
            p = slots + (slot * (n_out_columns + n_in_columns))[:, None] + column[None, :]
            parts += tl.load(p, mask=(slot < n_row_tiles)[:, None] & m_column[None, :], other=0)
        x = tl.sum(parts, axis=0)
        tl.store(scratch + tl.load(row + f.SOURCE + tl.where(is_in, 2, 1)) + column, x, mask=m_column)
        tl.store(totals + 3 + tile, tl.sum(x.to(tl.float64) * x, axis=0))


@triton.jit
def side(first_square, stored_sigma, second_square, eps, ITERATE: tl.constexpr):
    """(sigma, are the new vectors usable, factor of the first product, of the second) of one direction.

    With the first product s = W v and the second t = transpose(W) s: u = s / max(|s|, eps), and v is
    t / max(|s|, eps) divided by its norm. Unusable vectors give way to the stored ones, for which sigma is u.s.
    """
    first_norm = tl.maximum(tl.sqrt(first_square), eps)
    second = tl.sqrt(second_square) / first_norm
    second_norm = tl.maximum(second, eps)
    infinity = float("inf")
    usable = (first_square > 0) & (first_square < infinity) & (second_square > 0) & (second_square < infinity)
    usable = usable & ITERATE
    sigma = tl.where(usable, second * second / second_norm, stored_sigma)
    return sigma, usable, 1 / first_norm, 1 / (first_norm * second_norm)


@triton.jit
def both_sides(row, stats, eps, ITERATE: tl.constexpr):
    """sigma of the layer in fp64, and `side` of the output and of the input direction."""
    totals = stats + tl.load(row + f.STATS)
    n_out_tiles = field(row, f.N_OUT_COLUMN_TILES)
    tt = 0.0
    rr = 0.0
    if ITERATE:
        tt = sum_of(totals + 4, n_out_tiles)
        rr = sum_of(totals + 4 + n_out_tiles, field(row, f.N_IN_COLUMN_TILES))
    out_sigma, out_usable, u_out_factor, v_out_factor = side(tl.load(totals), tl.load(totals + 1), tt, eps, ITERATE)
    in_sigma, in_usable, v_in_factor, u_in_factor = side(tl.load(totals + 2), tl.load(totals + 3), rr, eps, ITERATE)
    sigma = tl.where(field(row, f.TWO_SIDED) != 0, (out_sigma + in_sigma) / 2, out_sigma)
    sigma = tl.where(tl.abs(sigma) < float("inf"), sigma, float("nan"))
    return sigma, out_usable, u_out_factor, v_out_factor, in_usable, u_in_factor, v_in_factor


@triton.jit
def one_vector(row, N: tl.constexpr, tile, scratch, snapshot, usable, factor, ITERATE: tl.constexpr, ACC: tl.constexpr):
    """VECTOR_BLOCK entries of vector N: new ones where usable, else the stored ones."""
    o = tile * f.VECTOR_BLOCK + tl.arange(0, f.VECTOR_BLOCK)
    m = o < tl.load(row + f.SIZE + N)
    stored = tl.load(row + f.STORED + N).to(tl.pointer_type(ACC))
    x = tl.load(stored + o, mask=m, other=0)
    if ITERATE:
        new = tl.load(scratch + tl.load(row + f.SOURCE + N) + o, mask=m, other=0).to(tl.float64) * factor
        x = tl.where(usable, new.to(ACC), x)
        tl.store(stored + o, x, mask=m)
    tl.store(snapshot + tl.load(row + f.SNAPSHOT + N) + o, x, mask=m)


@triton.jit
def vectors_tile(row, tile, scratch, stats, snapshot, sigmas, eps, ITERATE: tl.constexpr, ACC: tl.constexpr):
    """VECTOR_BLOCK entries of each of the layer's vectors, and sigma."""
    sigma, out_usable, u_out_factor, v_out_factor, in_usable, u_in_factor, v_in_factor = both_sides(
        row, stats, eps, ITERATE
    )
    if tile == 0:
        tl.store(sigmas + field(row, f.INDEX), sigma.to(ACC))
    one_vector(row, 0, tile, scratch, snapshot, out_usable, u_out_factor, ITERATE, ACC)
    one_vector(row, 1, tile, scratch, snapshot, out_usable, v_out_factor, ITERATE, ACC)
    if field(row, f.TWO_SIDED) != 0:
        one_vector(row, 2, tile, scratch, snapshot, in_usable, u_in_factor, ITERATE, ACC)
        one_vector(row, 3, tile, scratch, snapshot, in_usable, v_in_factor, ITERATE, ACC)


@triton.jit
def scaling_tile(
    row,
    tile,
    out_address,
    stats,
    scale,
    eps,
    ALIGNED: tl.constexpr,
    ITERATE: tl.constexpr,
    W_TYPE: tl.constexpr,
    OUT_TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """FLAT_STEPS blocks of the normalised weight, which has its weight's strides: both are flat memory here."""
    sigma = both_sides(row, stats, eps, ITERATE)[0].to(ACC)
    multiplier = tl.where(sigma == 0, 0, scale.to(ACC) / sigma).to(ACC)
    weight = pointer(tl.load(row + f.WEIGHT), W_TYPE, ALIGNED)
    out = pointer(out_address, OUT_TYPE, ALIGNED)
    numel = field(row, f.NUMEL)
    steps = field(row, f.FLAT_STEPS)
    for step in range(tile * steps, tl.minimum((tile + 1) * steps, field(row, f.FLAT_BLOCKS))):
        start = step * f.FLAT_BLOCK
        o = start + tl.arange(0, f.FLAT_BLOCK)
        if start + f.FLAT_BLOCK <= numel:  # without a mask, so that loads are wide
            w = tl.load(weight + o, eviction_policy="evict_first")
            tl.store(out + o, (w.to(ACC) * multiplier).to(OUT_TYPE))
        else:
            m = o < numel
            w = tl.load(weight + o, mask=m, other=0)
            tl.store(out + o, (w.to(ACC) * multiplier).to(OUT_TYPE), mask=m)
