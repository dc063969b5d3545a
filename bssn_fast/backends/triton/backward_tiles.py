"""The tiles of the backward pass: dW = scale/sigma (G - <G, W>/sigma S), S = u_out v_out, or the mean of both sides.

inner     this tile's share of <G, W>
gradient  dW
"""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_fast.backends.triton import fields as f
from bssn_fast.backends.triton.tiles import field, pointer


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
