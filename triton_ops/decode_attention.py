"""Attention of one new token, with the heads that share keys side by side.

torch's attention takes a single query for each query head, and on CPUs reads, and in 16 bits converts, keys
and values for each of them. Query heads of one head of keys are queries of the same keys.

The kernel runs where nothing would be told of a call, and elsewhere it is torch's attention. In a graph that
``torch.compile`` makes without gradient it is ``torch.ops.hf_sparse.decode_attention``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from triton_ops import choice
from triton_ops.ops import LIB, TAGS, in_inference_graph, is_for_torch, native_or_default
from triton_ops.unobserved import unobserved

MOST = 32
"""Query heads that share keys, at most: ``kSharingHeads`` of ``calls.h``."""


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """``softmax(scale query keyᵀ + mask) value`` of one new token of each sequence.

    On the CPU, without gradient, a kernel reads each key and value once, and of those before the first and
    after the last token that a bool ``mask`` shows none; scores and sums are float32 and rounded once.
    Elsewhere it is one call of ``F.scaled_dot_product_attention``.

    Args:
        query: ``[B, H, 1, D]``.
        key: ``[B, K, L, D]``; head h of the query belongs to head ``h // (H / K)`` of the keys.
        value: ``[B, K, L, V]``.
        mask: ``[B or 1, 1, 1, L]``, bool, False where a token is not seen, or of the dtype of ``query``,
            which is added to the scores; None: all are seen.
        scale: None means ``D ** -0.5``.

    Returns:
        ``[B, 1, H, V]``, the dtype of ``query``, contiguous; zeros where no token is seen.

    Raises:
        ValueError: ``query`` has more tokens than one, or H is no multiple of K.
        MemoryError: there is no memory for the scores.

    """
    _check(query, key)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if not is_for_torch(query.device.type):
        if unobserved(query, key, value, mask):
            return _decode_attention(query, key, value, mask, factor)
        if query.device.type == "cpu" and in_inference_graph():
            call = native_or_default(torch.ops.hf_sparse.decode_attention, "attention", query.dtype)
            return call(query, key, value, mask, factor)
    return _torchs(query, key, value, mask, factor)


def _check(query: Tensor, key: Tensor) -> None:
    own, theirs = query.shape, key.shape
    if len(own) != 4 or len(theirs) != 4 or own[2] != 1 or not theirs[1] or own[1] % theirs[1]:
        raise ValueError(
            f"query has shape {list(own)} and key {list(theirs)}; expected [B, H, 1, D] and [B, K, L, D], "
            "where H is a multiple of K."
        )


def _torchs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, _, size = query.shape
    together = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
    y = F.scaled_dot_product_attention(together, key, value, attn_mask=mask, scale=scale)
    return y.reshape(batch, 1, heads, value.shape[-1]).contiguous()


def _decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    _check(query, key)
    own = _by_kernel(query, key, value, mask, scale)
    return _torchs(query, key, value, mask, scale) if own is None else own


for _overload in ("decode_attention", "decode_attention.native"):
    LIB.define(
        f"{_overload}(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor", tags=TAGS
    )
LIB.impl("decode_attention", _decode_attention, "CPU")


@torch.library.register_fake("hf_sparse::decode_attention", lib=LIB)
@torch.library.register_fake("hf_sparse::decode_attention.native", lib=LIB)
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    _check(query, key)
    return query.new_empty((query.shape[0], 1, query.shape[1], value.shape[-1]))


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
    """None where there is none for such tensors."""
    batch, heads, _, size = query.shape
    length, dtype = key.shape[2], query.dtype
    if key.dtype is not dtype or value.dtype is not dtype:
        return None
    if key.shape[::3] != (batch, size) or value.shape[:3] != key.shape[:3] or heads > MOST * key.shape[1]:
        return None
    if not (query.numel() and key.numel() and value.numel()):
        return None
    if any(one.stride(-1) != 1 for one in (query, key, value)):
        return None
    if mask is not None:
        fits = mask.shape[1:] == (1, 1, length) and mask.shape[0] in (1, batch)
        if not fits or mask.stride(-1) != 1 or mask.dtype not in (torch.bool, dtype):
            return None
    backend = choice.backend_with("attention", dtype, choice.forced_backend())
    if backend is None or backend.attention is None:
        return None
    return backend.attention(query, key, value, mask, scale)
