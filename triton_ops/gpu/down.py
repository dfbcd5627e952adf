"""Sparse activations times a neuron-major weight, as two Triton kernels: partial outputs, and their sum.

A program owns some columns of the output and a range of neurons. It compacts the active ones in registers (a
prefix sum over their mask), so that every load it waits for is full of rows that are wanted: at 90 % sparsity
a tile of neurons with silent rows masked out would have one row in ten under way. Its sum goes to a partial
output of its own; a second kernel adds those in fixed order. No atomics, no host synchronisation, a grid that
depends on shapes alone.

Shapes: T tokens, D columns, F neurons, S splits of the neurons.
"""

# The parameters of a kernel are pointers, scalars and constexprs of Triton's own.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.gpu import launch
from triton_ops.gpu.numerics import round_to


@triton.jit
def pick(wanted, start, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Where ``wanted [SIZE]`` is true for the time number start and on: ``[COUNT]``, 0 past the last."""
    rank = tl.cumsum(wanted.to(tl.int32), 0) - 1
    slot = start + tl.arange(0, COUNT)
    here = wanted[None, :] & (rank[None, :] == slot[:, None])
    return tl.sum(tl.where(here, tl.arange(0, SIZE)[None, :], 0), axis=1)


@triton.jit
def _masked_sum(
    h_ptr, down_ptr, t, in_t, d, in_d, first, end, F, stride, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    # What the loop over tiles in _partial_kernel computes, one neuron at a time and never 0 * weight.
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for f in range(first, end):
        h = tl.load(h_ptr + t * F + f, mask=in_t, other=0.0).to(tl.float32)
        wanted = tl.max((h != 0.0).to(tl.int32), axis=0, keep_dims=True) > 0
        w = tl.load(down_ptr + f * stride + d, mask=in_d & wanted, other=0.0).to(tl.float32)
        acc += tl.where(h[:, None] != 0.0, h[:, None] * w[None, :], 0.0)
    return acc


@triton.jit
def _partial_kernel(
    h_ptr,
    down_ptr,
    partial_ptr,
    T,
    D,
    F,
    stride,
    spans,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    # partial_STD of BLOCK_T tokens, BLOCK_D columns and one split.
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2).to(tl.int64)
    in_t, in_d = t < T, d < D
    begin = split * spans * SPAN
    if BLOCK_T == 1:
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    else:
        acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for span in range(spans):
        first = begin + span * SPAN
        every = first + tl.arange(0, SPAN)
        looked_at = tl.load(
            h_ptr + t[:, None] * F + every[None, :],
            mask=in_t[:, None] & (every < F)[None, :],
            other=0.0,
            eviction_policy="evict_last",
        )
        wanted = tl.max((looked_at.to(tl.float32) != 0.0).to(tl.int32), axis=0) > 0
        count = tl.sum(wanted.to(tl.int32), axis=0)
        for start in range(0, count, ROWS):
            f = first + pick(wanted, start, ROWS, SPAN)
            taken = start + tl.arange(0, ROWS) < count
            w = tl.load(
                down_ptr + f[:, None] * stride + d[None, :],
                mask=taken[:, None] & in_d[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            if BLOCK_T == 1:
                h = tl.load(h_ptr + f, mask=taken, other=0.0).to(tl.float32)
                acc = tl.fma(h[:, None], w.to(tl.float32), acc)
            else:
                h = tl.load(
                    h_ptr + t[:, None] * F + f[None, :], mask=in_t[:, None] & taken[None, :], other=0.0
                )
                if UPCAST:
                    acc = tl.dot(h.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
                else:
                    acc = tl.dot(h, w, acc, input_precision="ieee")
    if BLOCK_T == 1:
        tl.store(partial_ptr + split * D + d, tl.sum(acc, axis=0), mask=in_d)
    else:
        # A row that another token wants was multiplied by 0: NaN if the weight is not finite. NaN stays, so
        # it is enough to look at the sum, and to do without tensor cores then.
        finite = tl.abs(acc) < float("inf")
        if tl.min(tl.min(finite.to(tl.int32), axis=1), axis=0) == 0:
            end = tl.minimum(begin + spans * SPAN, F)
            acc = _masked_sum(h_ptr, down_ptr, t, in_t, d, in_d, begin, end, F, stride, BLOCK_T, BLOCK_D)
        out = partial_ptr + (split * T + t[:, None]) * D + d[None, :]
        tl.store(out, acc, mask=in_t[:, None] & in_d[None, :])


@triton.jit
def _sum_kernel(
    partial_ptr,
    bias_ptr,
    y_ptr,
    T,
    D,
    splits,
    BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # y_TD of one token and BLOCK_D columns, in y's dtype.
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < D
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        acc += tl.load(
            partial_ptr + (s.to(tl.int64)[:, None] * T + t) * D + d[None, :],
            mask=(s < splits)[:, None] & in_d[None, :],
            other=0.0,
        )
    y = tl.sum(acc, axis=0)
    if BIAS:
        y += tl.load(bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(y_ptr + t * D + d, round_to(y, dtype).to(dtype), mask=in_d)


def interpreted() -> bool:
    """Whether the interpreter runs the kernels: ``TRITON_INTERPRET=1`` when Triton was first imported."""
    return not isinstance(_partial_kernel, triton.JITFunction)


def upcast(dtype: torch.dtype) -> bool:
    """Whether tensor core products must be done in float32: the interpreter's have no bfloat16."""
    return dtype == torch.bfloat16 and interpreted()


def down(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``h weightᵀ + bias`` without the rows of ``weight`` that no token wants.

    A token contributes exactly nothing where its h is 0, whatever the weight: no NaN from an infinite one.

    Args:
        h: ``[T, F]``, contiguous, T at least 1.
        weight: ``[D, F]``, neuron-major; dtype of ``h``.
        bias: ``[D]``, contiguous, or None.

    Returns:
        ``[T, D]``, dtype of ``h``, contiguous.

    """
    tokens, neurons = h.shape
    hidden = weight.shape[0]
    tile, splits, spans = launch.down(tokens, hidden, neurons)
    partial = torch.empty(splits, tokens, hidden, dtype=torch.float32, device=h.device)
    y = torch.empty(tokens, hidden, dtype=h.dtype, device=h.device)
    grid = (triton.cdiv(tokens, tile.BLOCK_T), triton.cdiv(hidden, tile.BLOCK_D), splits)
    _partial_kernel[grid](
        h,
        weight,
        partial,
        tokens,
        hidden,
        neurons,
        weight.stride(1),
        spans,
        UPCAST=upcast(h.dtype),
        **tile._asdict(),
    )
    width = launch.SUM_WIDTH
    _sum_kernel[(tokens, triton.cdiv(hidden, width))](
        partial,
        bias,
        y,
        tokens,
        hidden,
        splits,
        BIAS=bias is not None,
        BLOCK_S=min(launch.SUM_SPLITS, triton.next_power_of_2(splits)),
        BLOCK_D=width,
        num_warps=4,
        num_stages=1,
    )
    return y
