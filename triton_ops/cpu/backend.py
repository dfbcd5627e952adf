"""The compiled CPU backend: tensors in, one call of ``mlp.cpp``, tensors out."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_ops.activations import TABLE
from triton_ops.certificate import Certificate
from triton_ops.cpu import build, operators, products
from triton_ops.cpu.calls import DTYPES, kernels, no_memory, pointer, threads
from triton_ops.cpu.sparse_products import PAIRS
from triton_ops.layout import view_of
from triton_ops.mlp import MLP, Int8Weight, Scales
from triton_ops.protocol import Backend, Default

# struct Call of mlp.cpp. Between two layers of decoding nothing of Python is left in the caches, so what is
# done here for every call is kept small: ctypes would take longer to convert twenty arguments.
_pack = struct.Struct("14P6q3if").pack
_pack_linear = struct.Struct("7P4q4i").pack  # struct LinearCall
_pack_certify = struct.Struct("3P3q2i").pack  # struct CertifyCall
_pack_attention = struct.Struct("6P15q2ifi").pack  # struct AttentionCall


def unusable(device: str) -> str | None:
    """Why it cannot run on this type of device; None if it can. The first call builds it."""
    if device != "cpu":
        return f"it computes on the CPU and the tensors are on {device}"
    library = build.library()
    return library if isinstance(library, str) else None


def mlp(x: Tensor, mlp: MLP) -> Tensor:
    """``x [..., D]`` to ``[..., D]``; ``mlp.down [D, F]`` neuron-major."""
    return _call(x, x.new_empty(x.shape), mlp, TABLE[mlp.activation].code)


def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``h [..., F]`` to ``[..., D]``; ``weight [D, F]`` neuron-major."""
    y = h.new_empty((*h.shape[:-1], weight.shape[0]))
    h, bias = h.contiguous(), _contiguous(bias)
    inputs = h.data_ptr(), 0, 0
    return _run(inputs, weight, (0, 0, pointer(bias), 0, 0, 0, 0, 0, 0), y, (0, 0), 0, 0.0)


FEW = 8
"""Tokens that :func:`linear` multiplies at once: ``kFewTokens`` of ``calls.h``."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., F]`` to ``[..., D]``; ``weight [D, F]`` is read once for :data:`FEW` tokens.

    Rows or columns of ``weight`` must be contiguous; with other strides torch multiplies. So it does with
    more tokens in the dtypes that it has fast products in.
    """
    outputs, inputs = weight.shape
    between, step = weight.stride()
    columns = step != 1 and inputs != 1
    tokens = x.numel() // inputs
    if (tokens > FEW and products.has_own(x.dtype)) or (columns and between != 1 and outputs != 1):
        return F.linear(x, weight, bias).contiguous()
    y = x.new_empty((*x.shape[:-1], outputs))
    x, bias = x.contiguous(), _contiguous(bias)  # named, so that a copy lives until the kernel is done
    storage = weight.untyped_storage()  # another thread may change the layout meanwhile
    address = storage.data_ptr() + weight.storage_offset() * weight.itemsize
    _multiply(x, address, bias, y, step if columns else between, columns=columns)
    return y


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """``x [..., F]`` to ``[..., D]``, any number of tokens, :data:`FEW` at a time."""
    y = x.new_empty((*x.shape[:-1], weight.rows.shape[0]))
    # Of a view, which has the strides of its memory, also while another thread changes the layout.
    rows = _rows(view_of(weight.rows))
    assert rows is not None
    x, scale, bias = x.contiguous(), weight.scale.contiguous(), _contiguous(bias)
    _multiply(x, rows.data_ptr(), bias, y, rows.stride(0), (scale.data_ptr(), 0, 0))
    return y


def _multiply(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    y: Tensor,
    stride: int,
    beside: tuple[int, ...] = (0, 0, 0),
    *,
    columns: bool = False,
) -> None:
    """Run ``hfs_linear`` on contiguous ``x`` and ``y``, :data:`FEW` tokens at a time.

    ``weight`` is an address, ``beside`` those of its scales and of its certificate's rows and bounds;
    ``stride`` is between rows or columns.
    """
    inputs, outputs, size = x.shape[-1], y.shape[-1], x.itemsize
    tokens, dtype, team = x.numel() // inputs, DTYPES[x.dtype], threads()
    first, last, bias_address = x.data_ptr(), y.data_ptr(), pointer(bias)
    for begin in range(0, tokens, FEW):
        count = min(FEW, tokens - begin)
        call = _pack_linear(
            first + begin * inputs * size,
            weight,
            bias_address,
            *beside,
            last + begin * outputs * size,
            count,
            outputs,
            inputs,
            stride,
            dtype,
            columns,
            team,
            0,
        )
        if kernels().hfs_linear(call):
            no_memory(count)


def greedy_linear(x: Tensor, weight: Tensor, bias: Tensor | None, certificate: Certificate) -> Tensor:
    """``x [..., F]`` to ``[..., D]``, all of it for more than :data:`FEW` tokens; rows are contiguous."""
    outputs, inputs = weight.shape
    if x.numel() > FEW * inputs:
        return linear(x, weight, bias)
    y = x.new_empty((*x.shape[:-1], outputs))
    x, bias = x.contiguous(), _contiguous(bias)
    _multiply(x, weight.data_ptr(), bias, y, weight.stride(0), (0, *(one.data_ptr() for one in certificate)))
    return y


def certify(weight: Tensor, rows: Tensor, bounds: Tensor) -> None:
    """Write the certificate of ``weight [D, F]``, whose rows are contiguous, to ``rows`` and ``bounds``."""
    outputs, inputs = weight.shape
    tensors = weight, rows, bounds
    sizes = outputs, inputs, weight.stride(0)
    kernels().hfs_certify(
        _pack_certify(*[t.data_ptr() for t in tensors], *sizes, DTYPES[weight.dtype], threads())
    )


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``query [B, H, 1, D]``, ``key [B, K, L, D]``, ``value [B, K, L, V]`` to ``[B, 1, H, V]``."""
    batch, heads, _, size = query.shape
    y = query.new_empty((batch, 1, heads, value.shape[-1]))
    shown = mask is not None and mask.dtype is torch.bool
    failed = kernels().hfs_attention(
        _pack_attention(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            pointer(mask) if shown else 0,
            0 if shown else pointer(mask),
            y.data_ptr(),
            batch,
            heads,
            key.shape[1],
            key.shape[2],
            size,
            value.shape[-1],
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            mask.stride(0) if mask is not None and len(mask) == batch else 0,
            DTYPES[query.dtype],
            threads(),
            scale,
            0,
        )
    )
    return y if not failed else no_memory(batch)


def int8_mlp(x: Tensor, mlp: MLP, scales: Scales) -> Tensor:
    """``x [..., D]``, at most ``kMaxTokens`` of ``dots.h``, to ``[..., D]``; ``mlp.down`` neuron-major."""
    return _call(x, x.new_empty(x.shape), mlp, TABLE[mlp.activation].code, scales)


def int8_sparse_linear(h: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """``h [..., F]``, as many tokens as of :func:`int8_mlp`, to ``[..., D]``; rows neuron-major."""
    y = h.new_empty((*h.shape[:-1], weight.rows.shape[0]))
    nothing: Any = None
    mlp = MLP(nothing, None, weight.rows, None, None, bias, "", 0.0)
    return _call(h, y, mlp, 0, (None, None, weight.scale))


def _call(x: Tensor, y: Tensor, mlp: MLP, kind: int, scales: Scales = (None, None, None)) -> Tensor:
    first, up, down, first_bias, up_bias, down_bias, _, threshold, certificate = mlp
    threshold, each = (0.0, threshold) if isinstance(threshold, Tensor) else (threshold, None)
    # Named, so that copies live until the kernel is done.
    tensors = _contiguous(x), _rows(first), _rows(up)
    vectors = [
        _contiguous(v)
        for v in (first_bias, up_bias, down_bias, each, *(certificate or (None, None)), *scales)
    ]
    between = [0 if w is None else w.stride(0) for w in tensors[1:]]
    return _run(map(pointer, tensors), down, map(pointer, vectors), y, between, kind, threshold)


def _run(
    tensors: Iterable[int],
    down: Tensor,
    vectors: Iterable[int],
    y: Tensor,
    between: Iterable[int],
    kind: int,
    threshold: float,
) -> Tensor:
    """Run ``hfs_mlp`` with the addresses in ``Call`` before ``down`` and after it; gives ``y``."""
    storage = down.untyped_storage()  # another thread may change the layout meanwhile
    hidden, neurons = down.shape
    tokens = y.numel() // hidden
    failed = kernels().hfs_mlp(
        _pack(
            *tensors,
            storage.data_ptr() + down.storage_offset() * down.itemsize,
            *vectors,
            y.data_ptr(),
            tokens,
            hidden,
            neurons,
            *between,
            down.stride(1),
            DTYPES[y.dtype],
            kind,
            threads(),
            threshold,
        )
    )
    return y if not failed else no_memory(tokens)


def _rows(weight: Tensor | None) -> Tensor | None:
    """``weight`` with contiguous rows, as the kernel needs them; an ``nn.Linear`` has them already."""
    return weight if weight is None or weight.stride(1) == 1 else weight.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# From one two-core machine with AVX512-BF16, at the shapes of Llama-3.2-1B and Llama-2-7B;
# `python -m triton_ops.tune` measures yours. With up to four tokens any machine spends its time reading
# weights. A certificate is one byte per weight and leaves more rows to read than are active; it pays while
# those are well below half of a 2-byte gate. torch's own products of one token are slowest in bfloat16 and
# fast in float16: hence the sizes from which `linear` is worth a call that takes some microseconds longer. In
# bfloat16 that is so for the 216 KiB of a key projection of SmolLM2-135M, in a step of that model.
BACKEND = Backend(
    name="cpp",
    devices=("cpu",),
    dtypes=tuple(DTYPES),
    unusable=unusable,
    mlp=mlp,
    sparse_linear=sparse_linear,
    linear=linear,
    attention=attention,
    greedy_linear=greedy_linear,
    certify=certify,
    int8_mlp=int8_mlp,
    int8_linear=int8_linear,
    int8_sparse_linear=int8_sparse_linear,
    pairs=PAIRS,
    native=operators.are_there,
    certifies=True,
    multiplies=products.multiplies,
    defaults={
        torch.bfloat16: Default(
            min_bytes=1 << 20, few=4, linear_min_bytes=1 << 17, beyond=1.0, certified=(0.12,)
        ),
        torch.float16: Default(
            min_bytes=4 << 20,
            few=4,
            linear_min_bytes=2 << 20,
            beyond=1.0,
            certified=(0.12,),
            must_multiply=True,
        ),
        torch.float32: Default(
            min_bytes=4 << 20, few=4, linear_min_bytes=1 << 20, beyond=1.0, certified=(0.3,)
        ),
    },
)
