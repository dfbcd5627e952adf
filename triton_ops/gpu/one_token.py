"""The hidden layer of one token: gate, activation test, and the up rows of active neurons, in one launch.

With a certificate (:mod:`triton_ops.certificate`), a program first reads its neurons as int8 and goes on with
those that are not proven silent. What it then computes of a neuron is the same code with the same tiles, so
the same bits.

Shapes: D hidden size, F neurons. Weights are neuron-major: one row of D elements per neuron.
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
from triton_ops.gpu.down import pick
from triton_ops.gpu.numerics import DRELU, activate, add_bias, is_silent, load_threshold, round_to
from triton_ops.mlp import MLP

FOLD = tl.constexpr(16)  # int8 elements in one load of a lane


@triton.jit
def _dot_rows(x_ptr, rows_ptr, mask, D, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr):
    # [BLOCK_F]: x times the rows that start at rows_ptr [BLOCK_F]; masked rows are not read.
    acc = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < D
        w = tl.load(
            rows_ptr[:, None] + d[None, :],
            mask=mask[:, None] & in_d[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(x_ptr + d, mask=in_d, other=0.0, eviction_policy="evict_last")
        # Explicitly fused: the compiler may fuse in one variant of the kernel and not in another.
        acc = tl.fma(w.to(tl.float32), x.to(tl.float32)[None, :], acc)
    return tl.sum(acc, axis=1)


@triton.jit
def _neurons(
    x_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    thresholds_ptr,
    h_ptr,
    f,
    mask,
    D,
    gate_stride,
    up_stride,
    threshold,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Writes h of the neurons f [BLOCK_F].
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    p = _dot_rows(x_ptr, gate_ptr + f * gate_stride, mask, D, BLOCK_F, BLOCK_D)
    p = add_bias(p, gate_bias_ptr, f, mask, GATE_BIAS, dtype)
    t_f = load_threshold(threshold, thresholds_ptr, f, mask, EACH, dtype)
    active = mask & (is_silent(p, t_f, KIND, dtype) == 0)
    h = activate(p, t_f, KIND, dtype)
    if GATED:
        u = tl.zeros([BLOCK_F], tl.float32)
        if tl.max(active.to(tl.int32), axis=0) > 0:
            u = _dot_rows(x_ptr, up_ptr + f * up_stride, active, D, BLOCK_F, BLOCK_D)
        u = add_bias(u, up_bias_ptr, f, active, UP_BIAS, dtype)
        if KIND == DRELU:
            active = active & ((u <= 0.0) == 0)
        h = round_to(h * u, dtype)
    tl.store(h_ptr + f, tl.where(active, h, 0.0).to(dtype), mask=mask)


@triton.jit
def _upper_bound(
    x_ptr,
    q_ptr,
    bounds_ptr,
    f,
    in_f,
    D,
    gate_error,
    own_error,
    underflow,
    OWNED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    # B of triton_ops.certificate, with k = x, z = 1, e = 0: no less than what _dot_rows computes for the
    # neurons f [OWNED]; infinity or NaN where that cannot be said. u is 2**-24, g stands for gate_error, o
    # for own_error.
    acc = tl.zeros([OWNED, BLOCK_Q // FOLD], tl.float32)
    squares = tl.zeros([BLOCK_Q // FOLD], tl.float32)
    for start in range(0, D, BLOCK_Q):
        d = start + tl.arange(0, BLOCK_Q)
        in_d = d < D
        q = tl.load(
            q_ptr + f[:, None] * D + d[None, :],
            mask=in_f[:, None] & in_d[None, :],
            other=0,
            eviction_policy="evict_first",
        )
        x = tl.load(x_ptr + d, mask=in_d, other=0.0, eviction_policy="evict_last").to(tl.float32)
        # The FOLD products of a lane are added at once: registers are for loads under way, not for partial
        # sums.
        acc += tl.sum(tl.reshape(q.to(tl.float32) * x[None, :], [OWNED, BLOCK_Q // FOLD, FOLD]), axis=2)
        squares += tl.sum(tl.reshape(x * x, [BLOCK_Q // FOLD, FOLD]), axis=1)
    qx = tl.sum(acc, axis=1)
    square = tl.sum(squares, axis=0)
    s = tl.load(bounds_ptr + f * 3, mask=in_f, other=0.0)
    r = tl.load(bounds_ptr + f * 3 + 1, mask=in_f, other=float("inf"))
    m = tl.load(bounds_ptr + f * 3 + 2, mask=in_f, other=float("inf"))

    # An upper bound of the norm of x. The computed square is at least (1 - o) times the true one, less what
    # underflow takes, under 2**-125 per element; underflow / 16 is twice that. 1 / (1 - o) <= 1 + 2 o. The
    # last factor is for the roundings of this line, four, and the square root, good to 2**-22. Overflow gives
    # infinity.
    norm = tl.sqrt((square + underflow * 0.0625) * (1.0 + 2.0 * own_error)) * (1.0 + 2.0**-19)
    # So that _dot_rows cannot overflow. Neither can qx, at most 127 sqrt(D) ‖x‖, as ‖x‖ < 2**64 if it is
    # finite.
    norm = tl.where(m * norm < 2.0**125, norm, float("inf"))

    # w·x <= s (q·x) + r ‖x‖; q·x is computed to o ‖q‖ ‖x‖, where s ‖q‖ <= m + r; the gate's product to g m
    # ‖x‖. All terms are positive, so each of the seven operations loses at most a factor 1 - u: 1 + 2**-18 is
    # ample.
    spread = (r + own_error * (m + r) + gate_error * m) * norm * (1.0 + 2.0**-18)
    # s times qx is rounded once, the sum below once: 2 u of their size, where 2**-21 is 8 u.
    middle = s * qx
    return middle + (tl.abs(middle) * 2.0**-21 + spread + underflow * (1.0 + m + norm))


@triton.jit
def _hidden_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    thresholds_ptr,
    q_ptr,
    bounds_ptr,
    h_ptr,
    D,
    F,
    gate_stride,
    up_stride,
    threshold,
    gate_error,
    own_error,
    underflow,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    EACH: tl.constexpr,
    CERTIFIED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWNED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    # h_F of OWNED neurons.
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * OWNED
    f = first + tl.arange(0, OWNED)
    in_f = f < F
    if CERTIFIED:
        bound = _upper_bound(
            x_ptr, q_ptr, bounds_ptr, f, in_f, D, gate_error, own_error, underflow, OWNED, BLOCK_Q
        )
        # From here the operations of _neurons, all monotone: if the bound is silent, so is what it bounds.
        bound = add_bias(bound, gate_bias_ptr, f, in_f, GATE_BIAS, dtype)
        t_f = load_threshold(threshold, thresholds_ptr, f, in_f, EACH, dtype)
        silent = is_silent(bound, t_f, KIND, dtype)
        tl.store(h_ptr + f, tl.zeros([OWNED], tl.float32).to(dtype), mask=in_f & silent)
        open = in_f & (silent == 0)
        count = tl.sum(open.to(tl.int32), axis=0)
        for start in range(0, count, BLOCK_F):
            _neurons(
                x_ptr,
                gate_ptr,
                up_ptr,
                gate_bias_ptr,
                up_bias_ptr,
                thresholds_ptr,
                h_ptr,
                first + pick(open, start, BLOCK_F, OWNED),
                start + tl.arange(0, BLOCK_F) < count,
                D,
                gate_stride,
                up_stride,
                threshold,
                KIND,
                GATED,
                GATE_BIAS,
                UP_BIAS,
                EACH,
                BLOCK_F,
                BLOCK_D,
            )
    else:
        _neurons(
            x_ptr,
            gate_ptr,
            up_ptr,
            gate_bias_ptr,
            up_bias_ptr,
            thresholds_ptr,
            h_ptr,
            f,
            in_f,
            D,
            gate_stride,
            up_stride,
            threshold,
            KIND,
            GATED,
            GATE_BIAS,
            UP_BIAS,
            EACH,
            BLOCK_F,
            BLOCK_D,
        )


def hidden(x: Tensor, mlp: MLP) -> Tensor:
    """The hidden layer ``[1, F]``, dtype of ``x``, of one contiguous token ``x [1, D]``."""
    neurons, hidden = mlp.first.shape
    certified = mlp.certificate is not None
    q, bounds = (None, None) if mlp.certificate is None else (t.contiguous() for t in mlp.certificate)
    tile = launch.hidden_one(hidden, x.dtype, certified=certified)
    each = isinstance(mlp.threshold, Tensor)
    h = torch.empty(1, neurons, dtype=x.dtype, device=x.device)
    _hidden_kernel[(triton.cdiv(neurons, tile.OWNED),)](
        x,
        mlp.first,
        mlp.up,
        mlp.first_bias,
        mlp.up_bias,
        mlp.threshold if each else None,
        q,
        bounds,
        h,
        hidden,
        neurons,
        mlp.first.stride(0),
        0 if mlp.up is None else mlp.up.stride(0),
        0.0 if each else mlp.threshold,
        _relative_error(hidden, tile.BLOCK_D),
        _relative_error(hidden, tile.BLOCK_Q),
        # Underflow, as the certificate's docstring has it; a factor 1 + ‖w‖ + ‖x‖ is still to come.
        hidden * 2.0**-120,
        KIND=TABLE[mlp.activation].code,
        GATED=mlp.up is not None,
        GATE_BIAS=mlp.first_bias is not None,
        UP_BIAS=mlp.up_bias is not None,
        EACH=each,
        CERTIFIED=certified,
        **tile._asdict(),
    )
    return h


def _relative_error(hidden: int, width: int) -> float:
    """The g of the certificate's docstring for a dot product of ``hidden`` elements in tiles of ``width``.

    A product meets one rounding of its own if it is not fused, one per tile in its lane, and fewer than
    ``width`` when the lanes are added, in whatever order that is. Rounded up, for it becomes a float32.
    """
    roundings = 1 + triton.cdiv(hidden, width) + width
    error = roundings * 2.0**-24
    return error / (1 - error) * (1 + 2.0**-20)
