"""The tiles of the backward pass: dW = scale/sigma (G - <G, W>/sigma S), S = u_out v_out, or the mean of both sides.

inner     this tile's share of <G, W>
gradient  dW
"""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_fast.backends.triton import fields as f
from bssn_fast.backends.triton.tiles import field, place, pointer, sum_of


@triton.jit
def inner_tile(
    row,
    tile,
    grad_address,
    stats,
    ALIGNED: tl.constexpr,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """FLAT_STEPS blocks of products; the gradient has its weight's strides, so both are flat memory here."""
    weight = pointer(tl.load(row + f.WEIGHT), W_TYPE, ALIGNED)
    grad = pointer(grad_address, G_TYPE, ALIGNED)
    numel = field(row, f.NUMEL)
    steps = field(row, f.FLAT_STEPS)
    total = tl.zeros([f.FLAT_BLOCK], ACC)
    for step in range(tile * steps, tl.minimum((tile + 1) * steps, field(row, f.FLAT_BLOCKS))):
        start = step * f.FLAT_BLOCK
        o = start + tl.arange(0, f.FLAT_BLOCK)
        if start + f.FLAT_BLOCK <= numel:  # without a mask, so that loads are wide
            total += tl.load(grad + o).to(ACC) * tl.load(weight + o).to(ACC)
        else:
            m = o < numel
            total += tl.load(grad + o, mask=m, other=0).to(ACC) * tl.load(weight + o, mask=m, other=0).to(ACC)
    tl.store(stats + tl.load(row + f.STATS) + tile, tl.sum(total.to(tl.float64), axis=0))


@triton.jit
def gradient_tile(
    row,
    tile,
    grad_address,
    out_address,
    stats,
    snapshot,
    sigma,
    scale,
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

    inner = sum_of(stats + tl.load(row + f.STATS), field(row, f.N_FLAT_TILES)).to(ACC)
    multiplier = tl.where(sigma == 0, 0, scale.to(ACC) / sigma)
    ratio = tl.where(sigma == 0, 0, inner / sigma)
    if TWO:
        ratio = ratio / 2

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
