"""Attention of one new token by :func:`triton_ops.decode_attention`, under a name that transformers looks up.

What that does not fit is computed as ``"sdpa"`` says. In a compiled step, where the kernel does not run,
transformers would repeat keys and values in memory for the heads that share them, besides.

A compiled step has it until that ends, else a model only while it generates: elsewhere people look at the
name of its attention. A few models ask whether that is ``"sdpa"``, and compute something else where it is
not: they keep it.
"""

from __future__ import annotations

import inspect
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import triton_ops
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
    batch, heads, tokens, _ = query.shape
    shared = heads // key.shape[1]
    fits = tokens == 1 and shared * key.shape[1] == heads and batch == len(key) and not dropout
    if attention_mask is not None:  # the same for all heads
        fits = fits and attention_mask.ndim == 4 and attention_mask.shape[1:3] == (1, 1)
    if not fits or any(kwargs.get(name) is not None for name in _THEIRS):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return triton_ops.decode_attention(query, key, value, attention_mask, scale=scaling), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass
class _WhileGenerating:
    """That a model uses it while it generates: an attribute of the model object."""

    configs: list[PretrainedConfig]
    running: int = 0
    """Calls of ``generate()`` that have not ended."""


_MARK = "_hf_sparse_packed_while_generating"
_lock = threading.Lock()


def pack_attention(model: PreTrainedModel) -> None:
    """Have ``model`` use it, if it has torch's attention everywhere and does not ask for it by name."""
    _exchange(_packable(model), STOCK, NAME)


def pack_while_generating(model: PreTrainedModel) -> None:
    """The same in ``generate()`` alone, where it pays: see :func:`generating`."""
    if configs := _packable(model):
        vars(model)[_MARK] = _WhileGenerating(configs)


def stock_attention(model: PreTrainedModel) -> None:
    """Undo both, but for what somebody has chosen since."""
    vars(model).pop(_MARK, None)
    _exchange(_configs(model), NAME, STOCK)


@contextmanager
def generating(model: GenerationMixin) -> Iterator[None]:
    """In here ``model`` generates: with it on CPUs, in 16 bits."""
    found: _WhileGenerating | None = vars(model).get(_MARK)
    here: Any = model
    if found is None or here.device.type != "cpu" or here.dtype.itemsize != 2:
        yield
        return
    with _lock:
        found.running += 1
        if all(config._attn_implementation == STOCK for config in found.configs):
            _exchange(found.configs, STOCK, NAME)
    try:
        yield
    finally:
        with _lock:
            found.running -= 1
            if not found.running:
                _exchange(found.configs, NAME, STOCK)


def _exchange(configs: Iterable[PretrainedConfig], before: str, after: str) -> None:
    for config in configs:
        if config._attn_implementation == before:
            config._attn_implementation_internal = after


def _packable(model: PreTrainedModel) -> list[PretrainedConfig]:
    """The configs of a model that can have it; none of others."""
    configs = list(_configs(model))
    if {config._attn_implementation for config in configs} != {STOCK}:
        return []
    if not model._can_set_attn_implementation() or any(map(_asks_by_name, _files(model))):
        return []
    return configs


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
