"""The device table: what one row says about a layer and about a segment of tiles.

Rows hold 64-bit integers: sizes, strides, offsets into our own buffers, and the addresses that stay the same from call
to call. What changes with every call is a kernel argument: the address of the first output, from which the others have
the same distances as long as all lie in one buffer, and the addresses of the gradients.
"""

from __future__ import annotations

import triton.language as tl

from bssn_fast.laws import AT_MOST, GAIN

# A weight is addressed in vectors of V elements along its contiguous dimension: strides below count vectors.
# "Group" means V neighbouring input channels, K kernel positions each: the K V elements that a row of a tile holds.
WEIGHT = tl.constexpr(0)  # address
SHAPE = tl.constexpr(1)  # index into the kernel's tuple of tile shapes
TWO_SIDED = tl.constexpr(2)
C_OUT = tl.constexpr(3)
GROUPS = tl.constexpr(4)
K = tl.constexpr(5)
ROW_STRIDE = tl.constexpr(6)
GROUP_STRIDE = tl.constexpr(7)
K_STRIDE = tl.constexpr(8)
NUMEL = tl.constexpr(9)
ROWS_PER_TILE = tl.constexpr(10)
FLAT_STEPS = tl.constexpr(11)  # blocks of a flat tile
N_ROW_TILES = tl.constexpr(12)
N_FLAT_TILES = tl.constexpr(13)
N_OUT_COLUMN_TILES = tl.constexpr(14)
N_IN_COLUMN_TILES = tl.constexpr(15)
FOLD = tl.constexpr(16)  # offset in scratch: what is added up over lanes that may be any thread's
SLOTS = tl.constexpr(17)  # offset in scratch, [row tiles, |v_out| + SLOT_K |u_in|]: each tile's part of t and r
STATS = tl.constexpr(18)  # offset in stats
# Four entries each, in the order u_out, v_out, u_in, v_in.
STORED = tl.constexpr(19)  # address of the persistent vector
SOURCE = tl.constexpr(23)  # offset in scratch of the vector before normalisation: s, t, r, q
SNAPSHOT = tl.constexpr(27)  # offset in the snapshot
SIZE = tl.constexpr(31)
INDEX = tl.constexpr(35)  # of the layer in `sigma`
FLAT_BLOCKS = tl.constexpr(36)
OUTPUT = tl.constexpr(37)  # distance in bytes from the first layer's output
DONE_COUNTER = tl.constexpr(38)  # of finished tiles of the first stage; the next stage's counter follows
# Of rows that are one run of memory: vectors of a step, which is a whole number of channels, and the steps of a row.
STEP = tl.constexpr(39)
STEPS = tl.constexpr(40)
SLOT_K = tl.constexpr(41)  # entries of a slot's second half that add up to one of r
IN_ENTRIES = tl.constexpr(42)  # of r in a column tile
CHANNEL_SUMS = tl.constexpr(43)  # offset in scratch, [SLOT_K |u_in|]: r before it is added up over kernel positions
LAW = tl.constexpr(44)  # laws.CONSTANT, AT_MOST or GAIN
NUMBER = tl.constexpr(45)  # the upper 32 bits of the law's number, a double, and the lower ones; or, of a gain,
GAIN_ADDRESS = tl.constexpr(47)  # its address
GRAD_GAIN = tl.constexpr(48)  # index of the gain's gradient
LOOSE_SHAPE = tl.constexpr(49)  # where rows are kept in registers: index into the shapes of tiles that are not
LAYER_FIELDS = tl.constexpr(50)

AT_MOST_LAW = tl.constexpr(AT_MOST)
GAIN_LAW = tl.constexpr(GAIN)

START = tl.constexpr(0)  # number of the segment's first tile
KIND = tl.constexpr(1)
LAYER = tl.constexpr(2)
WAIT_COUNTER = tl.constexpr(3)
WAIT_COUNT = tl.constexpr(4)  # tiles that must have finished before this segment may run; 0: none
SEGMENT_FIELDS = tl.constexpr(5)

# Kinds of tiles. Forward: rows, columns, then vectors and scaling. Backward: inner product, then gradient.
ROWS = tl.constexpr(0)
COLUMNS = tl.constexpr(1)
VECTORS = tl.constexpr(2)
SCALING = tl.constexpr(3)
INNER = tl.constexpr(4)
GRADIENT = tl.constexpr(5)

# stats of a layer in the forward pass: |s|^2, u_out.s, |q|^2, v_in.q, and |t|^2 and |r|^2 per column tile.
# In the backward pass: <G, W> per flat tile.
FLAT_BLOCK = tl.constexpr(4096)  # elements of one step over a weight as flat memory
COLUMN_BLOCK = tl.constexpr(256)
IN_BLOCK = tl.constexpr(64)  # entries of r at a time that are added up over kernel positions,
K_BLOCK = tl.constexpr(8)  # as many of which at a time
FOLD_BLOCK = tl.constexpr(2048)  # elements of a tile that are added up over channels at a time
SLOT_BLOCK = tl.constexpr(16)  # slots added at a time
VECTOR_BLOCK = tl.constexpr(1024)
DROPPED_BLOCK = tl.constexpr(1024)  # elements at a time of a tile that did not stay in registers
SUM_BLOCK = tl.constexpr(128)  # partial sums added at a time
SEARCH_AT_ONCE = tl.constexpr(256)  # segments that one look for a tile's segment goes through

FIRST_COUNTER = tl.constexpr(16)
"""Counter 0 numbers the tiles and has its own 128 bytes; two counters per layer follow from here."""

BIAS = tl.constexpr(2**62)


def encode(number: int) -> int:
    """Return a number of -2^60 to 2^60 as an argument of a kernel: odd and 64 bits wide whatever it is.

    Triton compiles a kernel anew for arguments that are 1, divisible by 16 or short, also within a tuple.
    """
    return BIAS.value + 2 * number + 1
