"""How the Triton kernels are launched: tile sizes, programs, warps, by tokens, shape and dtype.

Nothing here changes what is computed except the order of summation. The constants are reasoned for an H200
(132 multiprocessors, 4.8 TB/s, of which each needs about 32 KiB in flight) and not yet tuned on one.

D is the hidden size, F the number of neurons, T the number of tokens. Sizes that become the side of a tile
are powers of two, as Triton demands.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

# One token, hidden: a program has ROWS rows of ROW_BYTES in flight, 8 KiB, and ends after one or two such
# loads. Short programs leave a short tail when the last ones run alone.
ROWS = 2
ROW_BYTES = 4096
# With a certificate: OWNED neurons per program, read as int8 in tiles of [OWNED, QUANTISED_WIDTH], 16 KiB.
OWNED = 8
QUANTISED_WIDTH = 2048

# Several tokens, hidden: tiles of tensor cores, which pad tokens to 16; STAGES loads are under way at a time.
MIN_TOKENS = 16
MAX_TOKENS = 32
NEURONS = 32
WIDTH_BYTES = 256
STAGES = 4

# Down: a program compacts the active ones of SPAN neurons at a time and reads their rows in tiles of
# [DOWN_ROWS, DOWN_WIDTH]. The neurons are split until there are PROGRAMS programs, about as many as are
# resident at once, so that all end together; every split costs D float32 of partial output per token.
SPAN = 128
DOWN_ROWS_ONE, DOWN_WIDTH_ONE, PROGRAMS_ONE = 8, 512, 1024
DOWN_ROWS, DOWN_WIDTH, PROGRAMS, DOWN_STAGES = 32, 128, 512, 3

# Sum of the partial outputs: narrow, because there are few columns and every multiprocessor should have some.
SUM_SPLITS = 32
SUM_WIDTH = 32

SMALLEST = 16  # side of a tile, whatever the shape


class HiddenOne(NamedTuple):
    """The kernel of :mod:`triton_ops.gpu.one_token`."""

    BLOCK_F: int
    """Rows of the gate, or of up, that are read together."""
    BLOCK_D: int
    """Elements of each that are read together."""
    OWNED: int
    """Neurons of a program; BLOCK_F without a certificate."""
    BLOCK_Q: int
    """Elements of each int8 row that are read together."""
    num_warps: int
    num_stages: int


class HiddenSeveral(NamedTuple):
    """The kernel of :mod:`triton_ops.gpu.several_tokens`."""

    BLOCK_T: int
    BLOCK_F: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


class Down(NamedTuple):
    """The kernel of :mod:`triton_ops.gpu.down`."""

    BLOCK_T: int
    BLOCK_D: int
    SPAN: int
    """Neurons that are compacted together."""
    ROWS: int
    """Rows that are read together."""
    num_warps: int
    num_stages: int


def hidden_one(hidden: int, dtype: torch.dtype, *, certified: bool) -> HiddenOne:
    """For one token and D = ``hidden``; BLOCK_F, BLOCK_D and num_warps do not depend on ``certified``.

    They fix the order of summation of a gate row, which must be the same with and without a certificate.
    """
    return HiddenOne(
        BLOCK_F=ROWS,
        BLOCK_D=side(ROW_BYTES // dtype.itemsize, hidden),
        OWNED=OWNED if certified else ROWS,
        BLOCK_Q=side(QUANTISED_WIDTH, hidden),
        num_warps=4,
        num_stages=1,
    )


def hidden_several(tokens: int, hidden: int, dtype: torch.dtype) -> HiddenSeveral:
    """For T = ``tokens`` of at least 2 and D = ``hidden``."""
    return HiddenSeveral(
        BLOCK_T=block_t(tokens),
        BLOCK_F=NEURONS,
        BLOCK_D=side(WIDTH_BYTES // dtype.itemsize, hidden),
        num_warps=4,
        num_stages=STAGES,
    )


def down(tokens: int, hidden: int, neurons: int) -> tuple[Down, int, int]:
    """The tiles, the number of splits of the neurons, and how many spans each split has."""
    one = tokens == 1
    tile = Down(
        BLOCK_T=block_t(tokens),
        BLOCK_D=side(DOWN_WIDTH_ONE if one else DOWN_WIDTH, hidden),
        SPAN=SPAN,
        ROWS=DOWN_ROWS_ONE if one else DOWN_ROWS,
        num_warps=4,
        num_stages=1 if one else DOWN_STAGES,
    )
    spans = triton.cdiv(neurons, tile.SPAN)
    programs = triton.cdiv(tokens, tile.BLOCK_T) * triton.cdiv(hidden, tile.BLOCK_D)
    wanted = triton.cdiv(PROGRAMS_ONE if one else PROGRAMS, programs)
    per_split = triton.cdiv(spans, min(wanted, spans))
    return tile, triton.cdiv(spans, per_split), per_split


def block_t(tokens: int) -> int:
    """Tokens of one program: 1, or as many as tensor cores take at once."""
    if tokens == 1:
        return 1
    return MIN_TOKENS if tokens <= MIN_TOKENS else MAX_TOKENS


def side(size: int, available: int) -> int:
    """Of a tile, at most ``size``, for so many elements."""
    return min(size, max(triton.next_power_of_2(available), SMALLEST))
