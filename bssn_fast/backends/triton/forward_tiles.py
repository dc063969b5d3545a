"""The tiles of the forward pass; the maths is that of reference.py, in the names of the package's documentation.

rows     s[o] = sum_ik W[o,i,k] v_out[i,k]      q[o,k] = sum_i W[o,i,k] u_in[i]      (one read of W)
         and this tile's rows' share of t[i,k] = sum_o W[o,i,k] s[o] and r[i] = sum_ok W[o,i,k] q[o,k]
columns  t and r: the row tiles' shares added in their order, r's also over kernel positions
vectors  u_out = s/|s|, v_out = t/|t|, v_in = q/|q|, u_in = r/|r|, to the persistent vectors and the snapshot
scaling  W times its multiplier, sigma_out = |t|/|s| and sigma_in = |r|/|q|
"""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_fast.backends.triton import fields as f
from bssn_fast.backends.triton.tiles import field, flat_blocks, multiplier_of, pointer, rounded, sum_of


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
def add_slots(row, part, first, last, target, scratch, ACC: tl.constexpr):
    """Add up entries `first` to `last` of the slots' part that begins at `part`; return the sum of their squares."""
    n_row_tiles = field(row, f.N_ROW_TILES)
    slot_size = tl.load(row + f.SIZE + 1) + tl.load(row + f.SIZE + 2) * tl.load(row + f.SLOT_K)
    slots = scratch + tl.load(row + f.SLOTS) + part
    o_slot = tl.arange(0, f.SLOT_BLOCK)
    squares = tl.zeros([f.COLUMN_BLOCK], tl.float64)
    for block in range(first, last, f.COLUMN_BLOCK):
        column = block + tl.arange(0, f.COLUMN_BLOCK)
        parts = tl.zeros([f.SLOT_BLOCK, f.COLUMN_BLOCK], ACC)
        for start in range(0, n_row_tiles, f.SLOT_BLOCK):
            slot = start + o_slot
            p = slots + (slot * slot_size)[:, None] + column[None, :]
            parts += tl.load(p, mask=(slot < n_row_tiles)[:, None] & (column < last)[None, :], other=0)
        x = tl.sum(parts, axis=0)
        tl.store(target + column, x, mask=column < last)
        squares += x.to(tl.float64) * x
    return tl.sum(squares, axis=0)


@triton.jit
def add_positions(sums, k_size, first, last, target, ACC: tl.constexpr):
    """Add up entries `first` to `last` of r over their kernel positions; return the sum of their squares."""
    entry = first + tl.arange(0, f.IN_BLOCK)
    parts = tl.zeros([f.IN_BLOCK, f.K_BLOCK], ACC)
    for start in range(0, k_size, f.K_BLOCK):
        k = start + tl.arange(0, f.K_BLOCK)
        p = sums + ((entry * k_size)[:, None] + k[None, :])
        parts += tl.load(p, mask=(entry < last)[:, None] & (k < k_size)[None, :], other=0)
    x = tl.sum(parts, axis=1)
    tl.store(target + entry, x, mask=entry < last)
    return tl.sum(x.to(tl.float64) * x, axis=0)


@triton.jit
def columns_tile(row, tile, scratch, stats, ITERATE: tl.constexpr, ACC: tl.constexpr):
    """Tile 0: |s|^2, u_out.s, |q|^2 and v_in.q. Others: COLUMN_BLOCK entries of t, then of r, and their squares."""
    totals = stats + tl.load(row + f.STATS)
    if tile == 0:
        square_and_product(row, 0, totals, scratch, ACC)
        square_and_product(row, 3, totals + 2, scratch, ACC)
    elif ITERATE:
        n_out_tiles = field(row, f.N_OUT_COLUMN_TILES)
        if tile <= n_out_tiles:
            first = (tile - 1) * f.COLUMN_BLOCK
            last = tl.minimum(first + f.COLUMN_BLOCK, field(row, f.SIZE + 1))
            t = scratch + tl.load(row + f.SOURCE + 1)
            total = add_slots(row, 0, first, last, t, scratch, ACC)
        else:
            in_entries = field(row, f.IN_ENTRIES)
            first = (tile - 1 - n_out_tiles) * in_entries
            last = tl.minimum(first + in_entries, field(row, f.SIZE + 2))
            r = scratch + tl.load(row + f.SOURCE + 2)
            slot_k = field(row, f.SLOT_K)
            sums = scratch + tl.load(row + tl.where(slot_k == 1, f.SOURCE + 2, f.CHANNEL_SUMS))
            total = add_slots(row, field(row, f.SIZE + 1), first * slot_k, last * slot_k, sums, scratch, ACC)
            if slot_k > 1:
                tl.debug_barrier()
                total = add_positions(sums, slot_k, first, last, r, ACC)
        tl.store(totals + 3 + tile, total)


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
    eps,
    ALIGNED: tl.constexpr,
    ITERATE: tl.constexpr,
    W_TYPE: tl.constexpr,
    OUT_TYPE: tl.constexpr,
    ACC: tl.constexpr,
):
    """FLAT_STEPS blocks of the normalised weight, which has its weight's strides: both are flat memory here."""
    weight = pointer(tl.load(row + f.WEIGHT), W_TYPE, ALIGNED)
    out = pointer(out_address, OUT_TYPE, ALIGNED)
    first, last, numel, has_rest = flat_blocks(row, tile)
    o = tl.arange(0, f.FLAT_BLOCK)
    # Each block is on its way before the one before it is needed, the first one before sigma is; masks that all lanes
    # share leave loads wide.
    w = tl.load(weight + (first * f.FLAT_BLOCK + o), mask=first < last, eviction_policy="evict_first")
    sigma = both_sides(row, stats, eps, ITERATE)[0].to(ACC)
    multiplier = multiplier_of(row, sigma, ACC)
    for block in tl.range(first, last, loop_unroll_factor=2):  # twice: else the copy below waits for the load
        following = (block + 1) * f.FLAT_BLOCK + o
        w_following = tl.load(weight + following, mask=block + 1 < last, eviction_policy="evict_first")
        tl.store(out + (block * f.FLAT_BLOCK + o), rounded(w.to(ACC) * multiplier, OUT_TYPE), cache_modifier=".cs")
        w = w_following
    if has_rest:
        o += last * f.FLAT_BLOCK
        w = tl.load(weight + o, mask=o < numel, other=0)
        tl.store(out + o, rounded(w.to(ACC) * multiplier, OUT_TYPE), mask=o < numel)
