"""What all tiles share: pointers from the table, the place of an element, waiting and announcing."""

from __future__ import annotations

import triton
import triton.language as tl

from bssn_fast.backends.triton import fields as f


@triton.jit
def field(row, name: tl.constexpr):
    """One entry of a table row as a 32-bit integer."""
    return tl.load(row + name).to(tl.int32)


@triton.jit
def pointer(address, dtype: tl.constexpr, aligned: tl.constexpr):
    """An address as a pointer; `aligned` promises 16 bytes, which wide loads need."""
    p = address.to(tl.int64).to(tl.pointer_type(dtype))
    return tl.multiple_of(p, 16) if aligned else p


@triton.jit
def decode(argument):
    """The integer that the host passed through `fields.encode`."""
    return (argument - f.BIAS) >> 1


@triton.jit
def choose(addresses, layer):
    """The address numbered `layer` of a tuple of kernel arguments."""
    chosen = addresses[0]
    for n in tl.static_range(1, len(addresses)):
        chosen = tl.where(layer == n, addresses[n], chosen)
    return decode(chosen)


@triton.jit
def float_of(bits):
    """The double whose bits these are: as a float argument it would arrive in fp32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def wait_for(counter, target):
    """Wait until `counter` has reached `target`. An atomic, as the compiler would delete a loop of plain loads."""
    while tl.atomic_add(counter, 0, sem="acquire") < target:
        pass


@triton.jit
def announce(counters, done):
    """Add one to counter `done`, after everything that this tile has written; 0 is for tiles that nothing waits for."""
    if done > 0:
        tl.debug_barrier()
        tl.atomic_add(counters + done, 1, sem="release")


@triton.jit
def find_segment(segments, tile, N_SEGMENTS: tl.constexpr):
    """Where in the table the segment of `tile` has its row: the last segment that does not start after it.

    Of many segments first every STEP-th one is looked at, then those from there on.
    """
    STEP: tl.constexpr = N_SEGMENTS // f.SEARCH_AT_ONCE if N_SEGMENTS > f.SEARCH_AT_ONCE else 1
    segment = last_start(segments, tile, 0, STEP, N_SEGMENTS // STEP)
    if STEP > 1:
        segment = last_start(segments, tile, segment, 1, STEP)
    return segment * f.SEGMENT_FIELDS


@triton.jit
def last_start(segments, tile, first, STEP: tl.constexpr, N: tl.constexpr):
    """The last of the N segments first, first + STEP, ... that does not start after `tile`."""
    n = first + tl.arange(0, N) * STEP
    starts = tl.load(segments + n * f.SEGMENT_FIELDS + f.START)
    return first + (tl.sum((starts <= tile).to(tl.int32), axis=0) - 1) * STEP


@triton.jit
def take_tile(segments, counters, first_tile, SINGLE: tl.constexpr, N_SEGMENTS: tl.constexpr):
    """This program's tile: its number in its segment, and where in the table that segment's row is.

    SINGLE: the next number is taken from counter 0, and all tiles this one builds on have been waited for on return.
    Counters only ever grow: a launch leaves each of them at a multiple of its tiles, so none has to be cleared.
    """
    if SINGLE:
        ticket = tl.atomic_add(counters, 1, sem="relaxed")
        n_tiles = tl.num_programs(0)
        tile = ticket % n_tiles
        segment = find_segment(segments, tile, N_SEGMENTS)
        count = tl.load(segments + segment + f.WAIT_COUNT)
        if count > 0:
            wait_for(counters + tl.load(segments + segment + f.WAIT_COUNTER), (ticket // n_tiles + 1) * count)
    else:
        tile = first_tile.to(tl.int64) + tl.program_id(0)
        segment = find_segment(segments, tile, N_SEGMENTS)
    return (tile - tl.load(segments + segment + f.START)).to(tl.int32), segment


@triton.jit
def draw(counters, end):
    """(The next of this launch's tickets, how many launches were before), for programs that draw one after another.

    From `end` on there is nothing left to do. Each program draws until it is told so, hence just once: as in
    `take_tile` each launch takes as many tickets as any other, `end` and one for each program, and no counter has to be
    cleared.
    """
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    period = end + tl.num_programs(0)
    return (ticket % period).to(tl.int32), ticket // period


@triton.jit
def layer_and_tile(ticket, launch, layers, segments, counters, N_SEGMENTS: tl.constexpr):
    """(Where the table has the row of the ticket's layer, the tile), once the tile need not wait."""
    segment = segments + find_segment(segments, ticket, N_SEGMENTS)
    count = tl.load(segment + f.WAIT_COUNT)
    if count > 0:
        wait_for(counters + tl.load(segment + f.WAIT_COUNTER), (launch + 1) * count)
    row = layers + field(segment, f.LAYER) * f.LAYER_FIELDS
    return row, ticket - field(segment, f.START)


@triton.jit
def place(row, SHAPES: tl.constexpr, SHAPE: tl.constexpr):
    """Where the elements e of a tile's rows belong, groups beginning at 0: all [groups x positions], flat.

    Returns (group, channel in the group, kernel position, place in v_out, offset in the weight, is in its group).
    A group has V neighbouring channels, then the next kernel position.
    """
    V: tl.constexpr = SHAPES[SHAPE][0]
    BG: tl.constexpr = SHAPES[SHAPE][4]
    BJ: tl.constexpr = SHAPES[SHAPE][5]
    k_size = field(row, f.K)
    e = tl.arange(0, BG * BJ)
    g = e // BJ
    j = e % BJ
    d = j % V
    k = j // V
    position = g * (k_size * V) + d * k_size + k
    offset = g * (field(row, f.GROUP_STRIDE) * V) + d + k * (field(row, f.K_STRIDE) * V)
    return g, d, k, position, offset, j < k_size * V


@triton.jit
def flat_blocks(row, tile):
    """(first, end of the whole blocks of a tile over flat memory, elements of the weight, is there a part of one)."""
    numel = field(row, f.NUMEL)
    steps = field(row, f.FLAT_STEPS)
    whole = numel // f.FLAT_BLOCK
    first = tile * steps
    last = tl.minimum(first + steps, whole)
    return first, last, numel, (first + steps > whole) & (whole < field(row, f.FLAT_BLOCKS))


@triton.jit
def sum_of(partials, n):
    """partials[0] + ... + partials[n - 1] in a fixed order."""
    o = tl.arange(0, f.SUM_BLOCK)
    total = tl.zeros([f.SUM_BLOCK], tl.float64)
    for start in range(0, n, f.SUM_BLOCK):
        total += tl.load(partials + start + o, mask=start + o < n, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def number_of(row, ACC: tl.constexpr):
    """The number of the weight's law."""
    return float_of((tl.load(row + f.NUMBER) << 32) | tl.load(row + f.NUMBER + 1)).to(ACC)


@triton.jit
def is_slack(row, sigma, ACC: tl.constexpr):
    """Whether a bound leaves the weight as it is; sigma in ACC, as it is written."""
    return (field(row, f.LAW) == f.AT_MOST_LAW) & (sigma <= number_of(row, ACC))


@triton.jit
def multiplier_of(row, sigma, ACC: tl.constexpr):
    """What the weight is multiplied by, as its law has it: `multiplier` of reference.py."""
    learned = field(row, f.LAW) == f.GAIN_LAW
    gain = tl.load(tl.load(row + f.GAIN_ADDRESS).to(tl.pointer_type(ACC)), mask=learned, other=0)
    dividend = tl.where(learned, gain, number_of(row, ACC))
    scaled = tl.where(sigma == 0, 0, dividend / sigma)
    return tl.where(is_slack(row, sigma, ACC), 1, scaled).to(ACC)


@triton.jit
def ratio_and_multiplier(row, tile, stats, sigma, grad_gains, TWO: tl.constexpr, ACC: tl.constexpr):
    """<G, W>/sigma, half of it where there are two sides, and the multiplier; the first tile writes a gain's gradient.

    The ratio is 0 where sigma is, and where a bound is slack.
    """
    inner = sum_of(stats + tl.load(row + f.STATS), field(row, f.N_FLAT_TILES)).to(ACC)
    ratio = tl.where((sigma == 0) | is_slack(row, sigma, ACC), 0, inner / sigma).to(ACC)
    learned = field(row, f.LAW) == f.GAIN_LAW
    tl.store(grad_gains + field(row, f.GRAD_GAIN), ratio, mask=learned & (tile == 0))
    if TWO:
        ratio = ratio / 2
    return ratio, multiplier_of(row, sigma, ACC)


@triton.jit
def rounded(x, OUT_TYPE: tl.constexpr):
    """The numbers in the type of the results. From fp64 to bf16 Triton's interpreter knows no way but by fp32."""
    narrow: tl.constexpr = OUT_TYPE.primitive_bitwidth == 16
    return (x.to(tl.float32) if narrow else x).to(OUT_TYPE)


@triton.jit
def add_to_slot(p_slot, part, mask, is_later):
    """Write the first rows' part to the slot and add that of later ones; the caller puts a barrier between them."""
    tl.store(p_slot, part + tl.load(p_slot, mask=mask & is_later, other=0), mask=mask)
