"""Attention of one new token, with the heads that share keys side by side.

torch's attention takes a single query for each query head, and on CPUs reads, and in 16 bits converts, keys
and values for each of them. Query heads of one head of keys are queries of the same keys.

No ``torch.library`` operator: the kernel runs only where nothing would be told of a call, and elsewhere it is
torch's attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from triton_ops import choice
from triton_ops.ops import is_for_torch
from triton_ops.unobserved import unobserved

MOST = 32
"""Query heads that share keys, at most: ``kShared`` of ``attention.h``, which says so, too."""


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """``softmax(scale query keyᵀ + mask) value`` of one new token of each sequence.

    On the CPU, without gradient, a kernel reads each key and value once; scores and sums are float32 and
    rounded once. Elsewhere it is one call of ``F.scaled_dot_product_attention``.

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
    batch, heads, tokens, size = query.shape
    shared, rest = divmod(heads, key.shape[1])
    if tokens != 1 or rest:
        raise ValueError(
            f"query has shape {list(query.shape)} and key {list(key.shape)}; expected [B, H, 1, D] and "
            "[B, K, L, D], where H is a multiple of K."
        )
    own = None
    if not is_for_torch(query.device.type) and unobserved(query, key, value, mask):
        own = _by_kernel(query, key, value, mask, size**-0.5 if scale is None else scale)
    if own is not None:
        return own
    together = query.reshape(batch, key.shape[1], shared, size)
    y = F.scaled_dot_product_attention(together, key, value, attn_mask=mask, scale=scale)
    return y.reshape(batch, 1, heads, value.shape[-1])


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
    backend = choice.cpu_backend("attention", dtype, choice.forced_backend())
    if backend is None or backend.attention is None:
        return None
    return backend.attention(query, key, value, mask, scale)
