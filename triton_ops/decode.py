"""Triton kernels for few tokens: silent neurons are masked out of the loads, nothing is compacted.

Three launches on a static grid: h (gate, activation test, up rows of active neurons), the down product into
partial outputs, their sum in fixed order. There are no atomics, no host synchronisation and no sizes that
depend on data, so the result is deterministic and can be captured in a CUDA graph.

Shapes: T tokens, D hidden size, F neurons, S splits of the neurons. Weights are neuron-major: one row of D
elements per neuron.
"""

# The parameters of a kernel are pointers, scalars and constexprs of Triton's own.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TOKENS = 8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = ("relu", "relu2", "jsrelu", "shifted_relu", "fatrelu", "drelu")

RELU2, JSRELU, SHIFTED, FAT, DRELU = (tl.constexpr(i) for i in range(1, 6))  # their places in ACTIVATIONS


@triton.jit
def _round(v, dtype: tl.constexpr):
    # Where the dense computation rounds to the dtype of the model, so that both select the same neurons.
    # Spelt out for bfloat16, because Triton's interpreter truncates.
    if dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(v != v, v, nearest.to(tl.float32, bitcast=True))
    else:  # noqa: RET505 (a constexpr branch must stay one)
        return v.to(dtype).to(tl.float32)


@triton.jit
def _dot_rows(
    x_ptr, rows_ptr, row_mask, D, T, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr
):
    # [BLOCK_T, BLOCK_F]: tokens times the rows that start at rows_ptr [BLOCK_F]; masked rows are not read.
    t = tl.arange(0, BLOCK_T)
    acc = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + t[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(rows_ptr[:, None] + d[None, :], mask=row_mask[:, None] & (d < D)[None, :], other=0.0)
        acc += tl.sum(x.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :], axis=2)
    return acc


@triton.jit
def _hidden_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    h_ptr,
    T,
    D,
    F,
    gate_stride,
    up_stride,
    threshold,
    KIND: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # h_TF of one block of neurons.
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    t = tl.arange(0, BLOCK_T)
    in_f = f < F
    valid = (t < T)[:, None] & in_f[None, :]
    p = _dot_rows(x_ptr, gate_ptr + f * gate_stride, in_f, D, T, BLOCK_T, BLOCK_F, BLOCK_D)
    if GATE_BIAS:
        p += tl.load(gate_bias_ptr + f, mask=in_f, other=0.0).to(tl.float32)[None, :]
    p = _round(p, dtype)
    # Written so that NaN counts as active.
    if KIND == FAT:
        silent = p < threshold
    else:
        silent = p <= threshold
    active = valid & (silent == 0)
    if KIND == RELU2:
        a = p * p
    elif KIND == JSRELU:
        a = p + 0.5 * _round(p * p, dtype)
    elif KIND == SHIFTED:
        a = p - threshold
    else:
        a = p
    a = _round(a, dtype)
    wanted = tl.max(active.to(tl.int32), axis=0) > 0
    u = _dot_rows(x_ptr, up_ptr + f * up_stride, wanted, D, T, BLOCK_T, BLOCK_F, BLOCK_D)
    if UP_BIAS:
        u += tl.load(up_bias_ptr + f, mask=wanted, other=0.0).to(tl.float32)[None, :]
    u = _round(u, dtype)
    if KIND == DRELU:
        active = active & ((u <= 0.0) == 0)
    h = tl.where(active, _round(a * u, dtype), 0.0)
    tl.store(h_ptr + t[:, None] * F + f[None, :], h, mask=valid)


@triton.jit
def _down_kernel(
    h_ptr,
    down_ptr,
    partial_ptr,
    T,
    D,
    F,
    down_stride,
    split_size,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # partial_STD of one block of columns and one split of the neurons.
    split = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    in_d = d < D
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, split_size, BLOCK_F):
        within = start + tl.arange(0, BLOCK_F)
        f = split.to(tl.int64) * split_size + within
        in_f = (f < F) & (within < split_size)
        h = tl.load(h_ptr + t[:, None] * F + f[None, :], mask=(t < T)[:, None] & in_f[None, :], other=0.0)
        h = h.to(tl.float32)
        wanted = tl.max((h != 0.0).to(tl.int32), axis=0) > 0
        w = tl.load(
            down_ptr + f[:, None] * down_stride + d[None, :],
            mask=wanted[:, None] & in_d[None, :],
            other=0.0,
        ).to(tl.float32)
        # A row that another token wants must not turn 0 * inf into NaN here.
        acc += tl.sum(tl.where(h[:, :, None] != 0.0, h[:, :, None] * w[None, :, :], 0.0), axis=1)
    out = partial_ptr + (split.to(tl.int64) * T + t[:, None]) * D + d[None, :]
    tl.store(out, acc, mask=(t < T)[:, None] & in_d[None, :])


@triton.jit
def _reduce_kernel(
    partial_ptr, bias_ptr, y_ptr, T, D, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK_D: tl.constexpr
):
    # y_TD of one token and one block of columns, in y's dtype.
    t = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for s in range(SPLITS):
        acc += tl.load(partial_ptr + (tl.full([], s, tl.int64) * T + t) * D + d, mask=d < D, other=0.0)
    if BIAS:
        acc += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(y_ptr + t.to(tl.int64) * D + d, _round(acc, dtype).to(dtype), mask=d < D)


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this path cannot run on ``device`` with ``dtype``; None if it can."""
    if device.type == "cpu" and isinstance(_down_kernel, triton.JITFunction):
        return (
            "Triton compiles for GPUs and the tensors are on the CPU "
            "(TRITON_INTERPRET=1, set before Python starts, runs the kernels in its interpreter)"
        )
    if device.type not in ("cpu", "cuda"):
        return f"it has not been written for {device.type} devices"
    return None if dtype in DTYPES else f"it has no kernel for {dtype}"


def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    threshold: float,
) -> Tensor:
    """``x [T, D]`` to ``[T, D]``; ``down [D, F]`` neuron-major."""
    gate, up = (w if w.stride(1) == 1 else w.contiguous() for w in (gate, up))
    neurons, hidden = gate.shape
    parts = []
    for part in x.contiguous().split(MAX_TOKENS):
        tokens = part.shape[0]
        block_t = triton.next_power_of_2(tokens)
        block_d = min(max(1024 // block_t, 16), max(triton.next_power_of_2(hidden), 16))
        h = torch.empty(tokens, neurons, dtype=torch.float32, device=x.device)
        _hidden_kernel[(triton.cdiv(neurons, 8),)](
            part,
            gate,
            up,
            gate_bias if gate_bias is None else gate_bias.contiguous(),
            up_bias if up_bias is None else up_bias.contiguous(),
            h,
            tokens,
            hidden,
            neurons,
            gate.stride(0),
            up.stride(0),
            # As in a dense comparison, the threshold counts in the dtype of the model.
            torch.tensor(threshold, dtype=x.dtype).item(),
            KIND=ACTIVATIONS.index(activation),
            GATE_BIAS=gate_bias is not None,
            UP_BIAS=up_bias is not None,
            BLOCK_T=block_t,
            BLOCK_F=8,
            BLOCK_D=block_d,
        )
        parts.append(_down(h, down, down_bias, x.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``h [T, F]`` to ``[T, D]``; ``weight [D, F]`` neuron-major."""
    parts = [_down(part, weight, bias, h.dtype) for part in h.contiguous().split(MAX_TOKENS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _down(h: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    tokens, neurons = h.shape
    hidden = weight.shape[0]
    block_t = triton.next_power_of_2(tokens)
    block_f = 16
    block_d = min(max(512 // block_t, 64), max(triton.next_power_of_2(hidden), 16))
    splits = max(1, min(64, neurons // 128))
    split_size = triton.cdiv(neurons, splits)
    partial = torch.empty(splits, tokens, hidden, dtype=torch.float32, device=h.device)
    y = torch.empty(tokens, hidden, dtype=dtype, device=h.device)
    grid = (triton.cdiv(hidden, block_d), splits)
    _down_kernel[grid](
        h,
        weight,
        partial,
        tokens,
        hidden,
        neurons,
        weight.stride(1),
        split_size,
        BLOCK_T=block_t,
        BLOCK_F=block_f,
        BLOCK_D=block_d,
    )
    _reduce_kernel[(grid[0], tokens)](
        partial,
        bias if bias is None else bias.contiguous(),
        y,
        tokens,
        hidden,
        SPLITS=splits,
        BIAS=bias is not None,
        BLOCK_D=block_d,
    )
    return y
