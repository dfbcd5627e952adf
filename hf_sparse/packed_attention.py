"""Attention of one new token by torch's own product, with the heads that share keys side by side.

In a compiled step transformers repeats keys and values for each query head, and calls torch's attention with
a single query for each, which on CPUs takes many times longer than to read them once. Query heads of one key
head are queries of the same keys: together they are one call, as transformers makes it itself outside of
compiled graphs. What that does not fit is computed as ``"sdpa"`` says.

A few models ask whether their attention is called ``"sdpa"``, and compute something else where it is not:
they keep it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_sparse.adapters.walk import modules_of

NAME = "hf_sparse_packed_sdpa"
STOCK = "sdpa"
_PACKAGES = ("builtins", "abc", "typing", "torch", "transformers", "hf_sparse")
_OURS = ("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs")
_THEIRS = (
    "softcap",
    *(name for name in inspect.signature(sdpa_attention_forward).parameters if name not in _OURS),
)
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
    fits = tokens == 1 and shared > 1 and batch == len(key)
    if attention_mask is not None:  # the same for all heads
        fits = fits and attention_mask.ndim == 4 and attention_mask.shape[1:3] == (1, 1)
    if not fits or any(kwargs.get(name) is not None for name in _THEIRS):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    together = query.reshape(batch, key.shape[1], shared, size)
    y = F.scaled_dot_product_attention(
        together, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return y.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def pack_attention(model: PreTrainedModel) -> None:
    """Have ``model`` use it, if it has torch's attention everywhere and does not ask for it by name."""
    configs = list(_configs(model))
    if {config._attn_implementation for config in configs} != {STOCK}:
        return
    if model._can_set_attn_implementation() and not any(map(_asks_by_name, _files(model))):
        for config in configs:
            config._attn_implementation_internal = NAME


def stock_attention(model: PreTrainedModel) -> None:
    """Undo :func:`pack_attention`, but for what somebody has chosen since."""
    for config in _configs(model):
        if config._attn_implementation == NAME:
            config._attn_implementation_internal = STOCK


def _configs(model: PreTrainedModel) -> Iterator[PretrainedConfig]:
    """Those that modules go by."""
    found: dict[int, PretrainedConfig] = {}
    todo = [
        config
        for module in modules_of(model)
        if isinstance(config := vars(module).get("config"), PretrainedConfig)
    ]
    while todo:
        config = todo.pop()
        if id(config) not in found:
            found[id(config)] = config
            own = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
            todo += [one for one in own if isinstance(one, PretrainedConfig)]
    yield from found.values()


def _files(model: PreTrainedModel) -> set[str]:
    """The Python modules in which this model is written, by name."""
    names = {cls.__module__ for module in modules_of(model) for cls in type(module).__mro__}
    return {
        name
        for name in names
        if name.startswith("transformers.models.") or name.partition(".")[0] not in _PACKAGES
    }


@cache
def _asks_by_name(module: str) -> bool:
    """Whether it may compute something else with an attention of another name; it may if nobody can tell."""
    try:
        text = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return True
    return re.search(rf"""["']{STOCK}["']""", text) is not None
