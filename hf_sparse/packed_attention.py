"""Attention of one new token by torch's own product, with the heads that share keys side by side.

In a compiled step transformers repeats keys and values for each query head, and calls torch's attention with
a single query for each, which on CPUs takes many times longer than to read them once. Query heads of one key
head are queries of the same keys: together they are one call, as transformers makes it itself outside of
compiled graphs. What that does not fit is computed as ``"sdpa"`` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "hf_sparse_packed_sdpa"
STOCK = "sdpa"
_OURS = ("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs")
_THEIRS = ("softcap", *(name for name in signature(sdpa_attention_forward).parameters if name not in _OURS))
"""What else transformers' function takes, and may change what it computes."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query [B, H, T, D]``, ``key`` and ``value [B, K, L, D]`` to ``[B, T, H, D]``, and None."""
    batch, heads, tokens, size = query.shape
    shared = heads // key.shape[1]
    masked_alike = attention_mask is None or (
        attention_mask.ndim == 4 and attention_mask.shape[1:3] == (1, 1)
    )
    if (
        tokens != 1
        or shared == 1
        or not masked_alike
        or any(kwargs.get(name) is not None for name in _THEIRS)
    ):
        y, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return y, None
    together = query.reshape(batch, key.shape[1], shared, size)
    y = F.scaled_dot_product_attention(
        together, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return y.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def pack_attention(model: PreTrainedModel) -> None:
    """Have ``model`` use it, if transformers lets it choose and it has torch's attention everywhere."""
    chosen = {config._attn_implementation for config in _configs(model.config)}
    if chosen == {STOCK} and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


def stock_attention(model: PreTrainedModel) -> None:
    """Undo :func:`pack_attention`, but for what somebody has chosen since."""
    for config in _configs(model.config):
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = STOCK


def _configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for name in getattr(config, "sub_configs", ()):
        if isinstance(own := getattr(config, name, None), PretrainedConfig):
            yield from _configs(own)
