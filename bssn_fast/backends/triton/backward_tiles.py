"""The tiles of the backward pass: dW = g (G - <G, W>/sigma S), S = u_out v_out, or the mean of both sides.

inner     this tile's share of <G, W>; nothing is read where a bound is slack, as dW = G there
gradient  dW, and a gain's gradient, <G, W>/sigma
"""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_fast.backends.triton import fields as f
from bssn_fast.backends.triton.tiles import flat_blocks, is_slack, pointer


@triton.jit
def inner_tile(
    row,
    tile,
    grad_address,
    stats,
    sigma,
    ALIGNED: tl.constexpr,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """FLAT_STEPS blocks of products; the gradient has its weight's strides, so both are flat memory here."""
    weight = pointer(tl.load(row + f.WEIGHT), W_TYPE, ALIGNED)
    grad = pointer(grad_address, G_TYPE, ALIGNED)
    first, last, numel, has_rest = flat_blocks(row, tile)
    needed = is_slack(row, sigma, ACC) == 0
    last = tl.where(needed, last, first)
    has_rest = has_rest & needed
    o = tl.arange(0, f.FLAT_BLOCK)
    w = tl.load(weight + (first * f.FLAT_BLOCK + o), mask=first < last)
    g = tl.load(grad + (first * f.FLAT_BLOCK + o), mask=first < last)
    total = tl.zeros([f.FLAT_BLOCK // 4], ACC)
    UNROLL: tl.constexpr = 2 if ALIGNED else 1  # narrow loads need too many registers
    for block in tl.range(first, last, loop_unroll_factor=UNROLL):  # loads run ahead, as in `scaling_tile`
        following = (block + 1) * f.FLAT_BLOCK + o
        w_following = tl.load(weight + following, mask=block + 1 < last)
        g_following = tl.load(grad + following, mask=block + 1 < last)
        total += tl.sum(tl.reshape(g.to(ACC) * w.to(ACC), [f.FLAT_BLOCK // 4, 4]), axis=1)
        w = w_following
        g = g_following
    if has_rest:
        o += last * f.FLAT_BLOCK
        product = tl.load(grad + o, mask=o < numel, other=0).to(ACC) * tl.load(weight + o, mask=o < numel, other=0)
        total += tl.sum(tl.reshape(product, [f.FLAT_BLOCK // 4, 4]), axis=1)
    tl.store(stats + tl.load(row + f.STATS) + tile, tl.sum(total.to(tl.float64), axis=0))
