"""Products with the pairs of token and active neuron (:mod:`triton_ops.pairs`), for training. Not yet timed.

The structure is made by torch. A program makes one row of a product, or the entries of one row of a sample;
what it reads of the dense matrix are the rows that the entries name, and neighbouring programs mostly find
them in the second-level cache. Sums are float32, in an order that the sizes fix.
"""

# The parameters of a kernel are pointers, scalars and constexprs of Triton's own.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.gpu.launch import side
from triton_ops.gpu.numerics import round_to
from triton_ops.pairs import MOST, Pairs

ENTRIES = 16
"""That are read together …"""
WIDTH = 128
"""… and so many elements of the row of each."""


@triton.jit
def _add(acc, start, end, column_ptr, value_ptr, b_ptr, b_row, b_column, n, in_n, ENTRIES: tl.constexpr):
    for first in range(start, end, ENTRIES):
        k = first + tl.arange(0, ENTRIES)
        there = k < end
        row = tl.load(column_ptr + k, mask=there, other=0).to(tl.int64)
        value = tl.load(value_ptr + k, mask=there, other=0.0)
        at = b_ptr + row[:, None] * b_row + n[None, :] * b_column
        b = tl.load(at, mask=there[:, None] & in_n[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(value[:, None] * b, 0)
    return acc


@triton.jit
def _product_kernel(
    start_ptr,
    column_ptr,
    value_ptr,
    b_ptr,
    b_row,
    b_column,
    more_ptr,
    other_ptr,
    other_row,
    other_column,
    bias_ptr,
    y_ptr,
    y_row,
    y_column,
    N,
    TWO: tl.constexpr,
    BIAS: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    n = (tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    in_n = n < N
    start, end = tl.load(start_ptr + r), tl.load(start_ptr + r + 1)
    acc = tl.zeros([WIDTH], tl.float32)
    acc = _add(acc, start, end, column_ptr, value_ptr, b_ptr, b_row, b_column, n, in_n, ENTRIES)
    if TWO:
        acc = _add(
            acc, start, end, column_ptr, more_ptr, other_ptr, other_row, other_column, n, in_n, ENTRIES
        )
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(y_ptr + r * y_row + n * y_column, round_to(acc, dtype).to(dtype), mask=in_n)


@triton.jit
def _sample_kernel(
    start_ptr,
    column_ptr,
    value_ptr,
    a_ptr,
    a_row,
    a_column,
    b_ptr,
    b_row,
    b_column,
    N,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    start, end = tl.load(start_ptr + r), tl.load(start_ptr + r + 1)
    for first in range(start, end, ENTRIES):
        k = first + tl.arange(0, ENTRIES)
        there = k < end
        row = tl.load(column_ptr + k, mask=there, other=0).to(tl.int64)
        acc = tl.zeros([ENTRIES], tl.float32)
        for begin in range(0, N, WIDTH):
            n = (begin + tl.arange(0, WIDTH)).to(tl.int64)
            in_n = n < N
            a = tl.load(a_ptr + r * a_row + n * a_column, mask=in_n, other=0.0).to(tl.float32)
            at = b_ptr + row[:, None] * b_row + n[None, :] * b_column
            b = tl.load(at, mask=there[:, None] & in_n[None, :], other=0.0).to(tl.float32)
            acc += tl.sum(a[None, :] * b, 1)
        tl.store(value_ptr + k, acc, mask=there)


def find(silent: Tensor, p: Tensor, most: int) -> tuple[Pairs, Tensor] | None:
    """As :class:`triton_ops.pairs.PairProducts` says."""
    rows, columns = p.shape
    active = silent.logical_not()
    start = torch.zeros(rows + 1, dtype=torch.int64, device=p.device)
    torch.cumsum(active.sum(1), 0, out=start[1:])
    if int(start[-1]) > min(most, MOST):
        return None
    column = active.nonzero()[:, 1].to(torch.int32)
    return Pairs(rows, columns, start, column), p[active]


def transposed(pairs: Pairs) -> tuple[Pairs, Tensor]:
    """As :class:`triton_ops.pairs.PairProducts` says."""
    column, device = pairs.column.long(), pairs.column.device
    place = column.argsort(stable=True)
    rows = torch.arange(pairs.rows, dtype=torch.int32, device=device).repeat_interleave(pairs.start.diff())
    start = torch.zeros(pairs.columns + 1, dtype=torch.int64, device=device)
    torch.cumsum(column.bincount(minlength=pairs.columns), 0, out=start[1:])
    return Pairs(pairs.columns, pairs.rows, start, rows[place]), place.to(torch.int32)


def product(pairs: Pairs, terms: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None, y: Tensor) -> Tensor:
    """As :class:`triton_ops.pairs.PairProducts` says."""
    (value, b), (more, other) = terms[0], terms[-1]
    N = b.shape[1]
    width = side(WIDTH, N)
    _product_kernel[pairs.rows, triton.cdiv(N, width)](
        pairs.start,
        pairs.column,
        value,
        b,
        *b.stride(),
        more,
        other,
        *other.stride(),
        b if bias is None else bias.contiguous(),
        y,
        *y.stride(),
        N,
        TWO=len(terms) > 1,
        BIAS=bias is not None,
        ENTRIES=ENTRIES,
        WIDTH=width,
    )
    return y


def sampled(pairs: Pairs, a: Tensor, b: Tensor) -> Tensor:
    """As :class:`triton_ops.pairs.PairProducts` says."""
    value = a.new_empty(len(pairs.column), dtype=torch.float32)
    N = b.shape[1]
    if len(value):
        _sample_kernel[(pairs.rows,)](
            pairs.start,
            pairs.column,
            value,
            a,
            *a.stride(),
            b,
            *b.stride(),
            N,
            ENTRIES=ENTRIES,
            WIDTH=side(WIDTH, N),
        )
    return value
