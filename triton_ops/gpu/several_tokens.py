"""The hidden layer for several tokens: tensor cores, and rows that no token of a block wants not read.

Up to 32 tokens share a program, and so each read of a row. The gate is read whole; of up, the loads of rows
that are silent for the whole block are masked out, one by one. A compacted list would fill the tiles better,
but costs a launch and saves no byte beyond that: what limits here is memory, and at the 60 % of the union of
8 independent tokens at 90 % a tile is more than half full anyway. The down product compacts, at no launch
(:mod:`triton_ops.gpu.down`).

Shapes: T tokens, D hidden size, F neurons.
"""

# The parameters of a kernel are pointers, scalars and constexprs of Triton's own.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_ops.activations import TABLE
from triton_ops.gpu import launch
from triton_ops.gpu.down import upcast
from triton_ops.gpu.numerics import DRELU, activate, add_bias, is_silent, load_threshold, round_to
from triton_ops.mlp import MLP


@triton.jit
def _dot_tile(
    x_ptr,
    rows_ptr,
    mask,
    t,
    in_t,
    D,
    UPCAST: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # [BLOCK_F, BLOCK_T]: the rows that start at rows_ptr [BLOCK_F] times the tokens t; masked rows are not
    # read.
    acc = tl.zeros([BLOCK_F, BLOCK_T], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < D
        w = tl.load(
            rows_ptr[:, None] + d[None, :],
            mask=mask[:, None] & in_d[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(
            x_ptr + t[None, :] * D + d[:, None],
            mask=in_t[None, :] & in_d[:, None],
            other=0.0,
            eviction_policy="evict_last",
        )
        if UPCAST:
            acc = tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(w, x, acc, input_precision="ieee")
    return acc


@triton.jit
def _hidden_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    thresholds_ptr,
    h_ptr,
    T,
    D,
    F,
    gate_stride,
    up_stride,
    threshold,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    EACH: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # h_TF of BLOCK_T tokens and BLOCK_F neurons. Blocks of tokens that share rows run side by side.
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_t, in_f = t < T, f < F
    valid = in_f[:, None] & in_t[None, :]
    p = _dot_tile(x_ptr, gate_ptr + f * gate_stride, in_f, t, in_t, D, UPCAST, BLOCK_F, BLOCK_T, BLOCK_D)
    p = add_bias(p, gate_bias_ptr, f[:, None], in_f[:, None], GATE_BIAS, dtype)
    t_f = load_threshold(threshold, thresholds_ptr, f[:, None], in_f[:, None], EACH, dtype)
    active = valid & (is_silent(p, t_f, KIND, dtype) == 0)
    h = activate(p, t_f, KIND, dtype)
    if GATED:
        wanted = tl.max(active.to(tl.int32), axis=1) > 0
        u = tl.zeros([BLOCK_F, BLOCK_T], tl.float32)
        if tl.max(wanted.to(tl.int32), axis=0) > 0:
            rows_ptr = up_ptr + f * up_stride
            u = _dot_tile(x_ptr, rows_ptr, wanted, t, in_t, D, UPCAST, BLOCK_F, BLOCK_T, BLOCK_D)
        u = add_bias(u, up_bias_ptr, f[:, None], wanted[:, None], UP_BIAS, dtype)
        if KIND == DRELU:
            active = active & ((u <= 0.0) == 0)
        h = round_to(h * u, dtype)
    tl.store(h_ptr + t[None, :] * F + f[:, None], tl.where(active, h, 0.0).to(dtype), mask=valid)


def hidden(x: Tensor, mlp: MLP) -> Tensor:
    """The hidden layer ``[T, F]``, dtype of ``x``, of the contiguous tokens ``x [T, D]``, T at least 2.

    The rows of ``mlp.first`` and ``mlp.up`` and the biases are contiguous.
    """
    tokens, (neurons, hidden) = x.shape[0], mlp.first.shape
    tile = launch.hidden_several(tokens, hidden, x.dtype)
    each = isinstance(mlp.threshold, Tensor)
    h = torch.empty(tokens, neurons, dtype=x.dtype, device=x.device)
    _hidden_kernel[triton.cdiv(tokens, tile.BLOCK_T), triton.cdiv(neurons, tile.BLOCK_F)](
        x,
        mlp.first,
        mlp.up,
        mlp.first_bias,
        mlp.up_bias,
        mlp.threshold if each else None,
        h,
        tokens,
        hidden,
        neurons,
        mlp.first.stride(0),
        0 if mlp.up is None else mlp.up.stride(0),
        0.0 if each else mlp.threshold,
        KIND=TABLE[mlp.activation].code,
        GATED=mlp.up is not None,
        GATE_BIAS=mlp.first_bias is not None,
        UP_BIAS=mlp.up_bias is not None,
        EACH=each,
        UPCAST=upcast(x.dtype),
        **tile._asdict(),
    )
    return h
